# Two commands need nothing but Python 3.11+ and a network to a package index: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: help install demo test test-slow test-cluster test-all lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

install: $(VENV)/installed  ## create .venv and install everything

demo: $(VENV)/installed  ## the main job on a CPU, end to end (about 5 minutes)
	$(BIN)/python -m tubelet.program.demo

test: $(VENV)/installed  ## the test-suite (15 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=10

test-slow: $(VENV)/installed  ## the slow tests; TUBELET_SLOW_SHARE=0.5 TUBELET_SLOW_SEED=abc runs a random half
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile --durations=10 --timeout=1200

test-cluster: $(VENV)/installed  ## jobs on several hosts, made on this one: installs what they need, as root, and cleans up
	$(BIN)/python -m pytest -m cluster tests/cluster --timeout=900 --durations=10

test-all: $(VENV)/installed  ## everything that one host needs no root for
	$(BIN)/python -m pytest -m 'not cluster' --durations=20 --timeout=1200

lint: $(VENV)/installed  ## ruff, pyright, import floors
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

clean:  ## remove what the demo and the tests left
	rm -rf demo_out demo_out.* .pytest_cache .ruff_cache
