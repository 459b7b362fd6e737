# make            set up, train, TRIALS runs of each of the four approaches; analysis and figure
# make sweep      the same on 1, 2, 4, ... up to all physical cores
# make original   the article's programs on the article's stack of 2019 (needs a Python 3.7)
# make test       set up, run all tests
# make lint       check format and style
# make benchmark  memory, an idle Ray, calls of other lengths, and the price of loading taken apart
# make clean      remove the environments; results, model and data stay

PYTHON  ?= python3
TRIALS  ?= 5
ROUNDS  ?= 10
DATA    ?= /tmp/mnist.npz
RESULTS ?= results.jsonl
FIGURE  ?= results.png
# MODEL is made from DATA; do not name a file that you want to keep.
MODEL   ?= /tmp/model.keras
# ARRAY=--array makes the article's call to the letter, which today waits for an autotuner.
ARRAY   ?=
# CORES="1 2 4" measures on so many cores, one number after the other.
CORES   ?= $$($(RUN) -c '$(COUNT); print(count)')

RUN   = .venv/bin/python
COUNT = import bench_serial; count = len(bench_serial.physical_cores())
SWEEP = print(*sorted({count} | {2**i for i in range(count.bit_length())}))

# What a user's shell exports for other programs must not decide here.
unexport PIP_USER PIP_TARGET PIP_PREFIX
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONWARNINGS
unexport KERAS_NNX_ENABLED TF_NUM_INTRAOP_THREADS
unexport TF_ENABLE_ONEDNN_OPTS TF_XLA_FLAGS XLA_FLAGS

# In four passes each approach follows each other one once: what one leaves hits all alike.
define MEASURE
set -eu
numbers_of_cores=$(CORES)
for pass in $$(seq $(TRIALS)); do
    case $$((pass % 4)) in
        1) approaches="serial pool ray initializer" ;;
        2) approaches="pool initializer serial ray" ;;
        3) approaches="initializer ray pool serial" ;;
        0) approaches="ray serial initializer pool" ;;
    esac
    for cores in $$numbers_of_cores; do
        for approach in $$approaches; do
            case $$approach in
                serial) script="bench_serial.py" ;;
                pool) script="bench_multiprocessing.py" ;;
                initializer) script="bench_multiprocessing.py --initializer" ;;
                ray) script="bench_ray.py" ;;
            esac
            printf '%s' "pass $$pass of $(TRIALS), $$cores cores, $$script: "
            if ! $(RUN) $$script --num-cpus $$cores --rounds $(ROUNDS) $(ARRAY) \
                --model $(MODEL) --data $(DATA) --output $(RESULTS) > make.log 2>&1
            then
                cat make.log >&2
                exit 1
            fi
            tail -n 1 make.log
        done
    done
done
endef
export MEASURE

all: $(MODEL)
	@sh -c "$$MEASURE"
	@$(RUN) analyze.py --figure $(FIGURE) $(RESULTS)

sweep: CORES = $$($(RUN) -c '$(COUNT); $(SWEEP)')
sweep: all

# Trained again when the data are missing, newer, or others than last time.
$(MODEL): .venv/ready .venv/data $(or $(wildcard $(DATA)),missing)
	@$(RUN) train_model.py --model $(MODEL) --data $(DATA)

.venv/data: .venv/ready always
	@echo $(abspath $(DATA)) | cmp -s - $@ || echo $(abspath $(DATA)) > $@

original: .venv/ready
	@$(MAKE) --no-print-directory -C original

# An environment whose Python is gone, after an upgrade of the system's, is made anew.
ifneq ($(shell .venv/bin/python -c 'print("runs")' 2> /dev/null),runs)
.PHONY: .venv/ready
endif

.venv/ready: requirements.txt
	@test ! -L .venv || \
		{ echo ".venv is a link to a folder that would be emptied: remove the link" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13: make PYTHON=... names another" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

test: .venv/ready-dev
	$(RUN) -m pytest -n 2 --dist loadfile

lint: .venv/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

benchmark: $(MODEL) .venv/ready-dev
	$(RUN) docs/overhead.py --model $(MODEL) --data $(DATA)

clean:
	rm -rf .venv original/.venv

.NOTPARALLEL:
.PHONY: all sweep original test lint benchmark clean always missing
