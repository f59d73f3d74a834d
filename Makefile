# Needs python3.11 (or another Python >= 3.10) and pip; everything else is installed into .venv.
#
#   make demo            a real dense model becomes a trained, exported Mixture-of-Experts (FAST=1: a short one)
#   make test            the tests      (TESTS=tests/modeling  ARGS="-k top_p -x"  MARKS= for the slow ones too)
#   make lint            formatting, ruff, mypy              make format   write the formatting
#   make bench           the benchmarks                      make docs     run the documentation's examples
#   make dist            sdist and wheel in dist/            make clean    remove what was built, and .venv

PYTHON ?= $(firstword $(shell command -v python3.11 python3))

# torch comes first and on its own: resolved together with the rest, pip takes the newest build on the package index,
# which on Linux brings gigabytes of CUDA libraries. A pinned version also accepts a CPU build ("+cpu") wherever pip
# can see one, and prefers it. To point pip at the CPU builds, to have a CUDA build, or another version:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130
#   make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

TESTS ?= tests
ARGS ?=
MARKS ?= not slow
# Two processes pay for the whole suite; for a few files their start costs more than they save.
WORKERS ?= $(if $(filter tests tests/,$(TESTS)),2,0)
BENCH ?= $(sort $(wildcard benchmarks/bench_*.py))

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LINTED := $(wildcard hf_moe_ext modeling kernels trainers tests examples benchmarks)

# Threads that wait sleep instead of spinning: on a busy machine spinning can slow training tenfold.
export OMP_WAIT_POLICY ?= PASSIVE
# Huge pages for large tensors: without them, half of a training step on a CPU can go to page faults.
export THP_MEM_ALLOC_ENABLE ?= 1

.PHONY: demo test lint format bench docs dist clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	$(BIN)/hf-moe demo $(if $(filter-out 0,$(FAST)),--fast) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(TESTS) -m "$(MARKS)" -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format $(LINTED)
	$(BIN)/ruff check --fix $(LINTED)

bench: $(VENV)/.dev
	@for file in $(BENCH); do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

docs: $(VENV)/.dev
	$(BIN)/python -m pytest tests/docs $(ARGS)

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: what is installed in $(VENV). Each is made anew when pyproject.toml changes.
$(VENV)/.torch:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Found no Python >= 3.10 (tried: $(or $(PYTHON),python3.11, python3)). Install it or pass PYTHON=..."; exit 1; }
	@echo "== creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== installing $(TORCH) (the largest download)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "== installing hf-moe-ext (editable) and what the demo needs"
	@$(PIP) --editable ".[demo]"
	@echo "== fetching a real model and real text (once)"
	@$(BIN)/hf-moe demo --prepare
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "== installing hf-moe-ext (editable) and the development tools"
	@$(PIP) --editable ".[dev]"
	@touch $@
