# make demo    set up, then train the demo model and write its report (minutes on two cores)
# make demo-distributed   the same model for 40 steps on 4 local ranks and on one: the same curve
# make test    set up, then run the tests            make check   format, lint and types
# make bench   speed and memory tables               make bench-routing   compare routing rules (hours)
# make bench-package   speed and size of packages and updates, five million hostile mutants (hours; 12 GB of disk)
# make gpu-code   compile the GPU kernels for sm_90 and sm_80, without a GPU (half a minute)
# make bench-gpu   the sparse layer on a GPU beside other ways (5 minutes)   make h200-curves   gap against top-2, equal time
# make bench-plan   the planner against published training runs (minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT := $(or $(OUT),runs/demo-$(shell date +%Y%m%d-%H%M%S))
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
SHORT := train.steps=40 train.precision=fp32 data.tokenizer=bytes train.evaluate_every=0

.PHONY: demo demo-distributed test test-all check bench bench-gpu bench-package bench-plan bench-routing gpu-code h200-curves env \
	clean

demo: env
	$(BIN)/moestro train recipes/demo.toml out=$(OUT)

demo-distributed: env
	$(BIN)/moestro train recipes/demo.toml $(SHORT) out=$(OUT)/ranks dist.ranks=4 dist.ep=2
	$(BIN)/moestro train recipes/demo.toml $(SHORT) out=$(OUT)/one
	$(BIN)/python scripts/same_curve.py $(OUT)/ranks $(OUT)/one

test: env
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: env
	$(BIN)/python -m pytest

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: env
	$(BIN)/python benchmarks/moe_layer.py
	$(BIN)/python benchmarks/step_share.py

bench-package: env
	$(BIN)/python benchmarks/update_pairs.py runs/pairs-small --small
	$(BIN)/python benchmarks/package.py --gb 0.5 --access-gb 10 --pairs runs/pairs-small
	$(BIN)/python benchmarks/ship.py runs/bench-ship
	$(BIN)/python benchmarks/ship_kills.py runs/bench-ship-kills
	$(BIN)/python benchmarks/fuzz.py --mutants 5000000 --tries 100000

gpu-code: env
	$(BIN)/python scripts/gpu_code.py --chip 90 --chip 80

bench-gpu: env
	$(BIN)/python benchmarks/moe_layer_gpu.py

h200-curves: env
	$(BIN)/python benchmarks/equal_time.py recipes/h200-top2.toml recipes/h200-gap.toml

bench-plan: env
	$(BIN)/python benchmarks/plan.py

bench-routing: env
	$(BIN)/python benchmarks/routing.py

env: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt scripts/install_torch.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moestro needs Python 3.11 or newer; give it with make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_torch.py constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
