# make            set up, train once, TRIALS runs of each of the four approaches, taking turns; analysis and figure
# make sweep      the same on 1, 2, 4, ... up to all physical cores
# make original   the article's programs on the article's stack of 2019 (needs a Python 3.7)
# make test       set up, run all tests
# make lint       check format and style
# make benchmark  what the presence of Ray, and our deviations from the article, cost: measured here
# make clean      remove the environments; results, model and data stay

PYTHON  ?= python3
TRIALS  ?= 5
ROUNDS  ?= 10
MODE    ?= predict
MODEL   ?= /tmp/model.keras
DATA    ?= /tmp/mnist.npz
RESULTS ?= results.jsonl
FIGURE  ?= results.png
RUN      = .venv/bin/python
COUNT    = $(RUN) -c 'import bench_serial; n = len(bench_serial.physical_cores());
CORES    = $$($(COUNT) print(n)')
SWEEP    = $$($(COUNT) print(*sorted({n} | {2**i for i in range(n.bit_length())}))')

# What a user's shell exports for other programs must not decide here.
unexport PIP_USER PIP_TARGET PIP_PREFIX PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONWARNINGS

# One run of each approach a pass, the order turned from pass to pass: a machine that drifts hits all alike.
all: train
	@set -- bench_serial.py bench_multiprocessing.py 'bench_multiprocessing.py --initializer' \
		'bench_ray.py --address local'; \
	for pass in $$(seq $(TRIALS)); do \
		for cores in $(CORES); do for script in "$$@"; do \
			printf '%s' "pass $$pass of $(TRIALS), $$cores cores, $$script: "; \
			$(RUN) $$script --mode $(MODE) --rounds $(ROUNDS) --num-cpus $$cores --model $(MODEL) --data $(DATA) \
				--output $(RESULTS) > make.log 2>&1 || { cat make.log >&2; exit 1; }; \
			tail -n 1 make.log; \
		done; done; \
		first=$$1; shift; set -- "$$@" "$$first"; \
	done
	@$(RUN) analyze.py --figure $(FIGURE) $(RESULTS)

sweep: CORES = $(SWEEP)
sweep: all

train: .venv/ready
	@test -e $(MODEL) && test -e $(DATA) || $(RUN) train_model.py --model $(MODEL) --data $(DATA)

original: .venv/ready
	@$(MAKE) --no-print-directory -C original

# An environment whose Python is gone, after an upgrade of the system's, is made anew.
ifneq ($(shell .venv/bin/python -c 'print("runs")' 2> /dev/null),runs)
.PHONY: .venv/ready
endif

.venv/ready: requirements.txt
	@test ! -L .venv || { echo ".venv is a link, and what it leads to would be emptied: remove the link" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13: name one that is, make PYTHON=..." >&2; exit 1; }
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

benchmark: train .venv/ready-dev
	$(RUN) docs/overhead.py --model $(MODEL) --data $(DATA)

clean:
	rm -rf .venv original/.venv

.NOTPARALLEL:
.PHONY: all sweep train original test lint benchmark clean
