# make            set up, train once, run what is missing of TRIALS interleaved passes, analyze
# make sweep      the same for 1, 2, 4, ... up to all physical cores
# make test       set up, run the tests
# make lint       check format and style
# make benchmark  the ratios of tests/benchmarks, measured here
# make clean      remove the environment; results and model stay

PYTHON  ?= python3
TRIALS  ?= 5
ROUNDS  ?= 10
MODEL   ?= /tmp/model.keras
DATA    ?= /tmp/mnist.npz
RESULTS ?= results.jsonl
FIGURE  ?= results.png
FLAGS   ?=
RUN      = .venv/bin/python
CORES   ?= $$($(RUN) -c 'import bench_serial; print(len(bench_serial.physical_cores()))')
SWEEP    = $$($(RUN) -c 'import bench_serial; n = len(bench_serial.physical_cores()); \
	print(*sorted({n} | {2**i for i in range(n.bit_length())}), sep=",")')

all: measure analyze

# One trial at a time, of the approach that has the fewest: a machine that drifts hits all alike, and what was
# finished before an interruption counts.
measure: train
	@while next=$$($(RUN) analyze.py --next $(TRIALS) --cores "$(CORES)" --rounds $(ROUNDS) --model $(MODEL) \
		--data $(DATA) $(FLAGS) $(RESULTS)) || exit 1; [ -n "$$next" ]; do eval "$(RUN) $$next" || exit 1; done

analyze: | .venv/ready
	$(RUN) analyze.py --figure $(FIGURE) $(RESULTS)

sweep: CORES = $(SWEEP)
sweep: all

train: | .venv/ready
	@test -e $(MODEL) && test -e $(DATA) || $(RUN) train_model.py --model $(MODEL) --data $(DATA)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

test: .venv/ready-dev
	$(RUN) -m pytest

lint: .venv/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

benchmark: train .venv/ready-dev
	$(RUN) tests/benchmarks/overhead.py --model $(MODEL) --data $(DATA)

clean:
	rm -rf .venv

.NOTPARALLEL:
.PHONY: all measure analyze sweep train test lint benchmark clean
