# llmray's environment, checks, demo and benchmarks. `make help` lists the targets; none needs root.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TIMES := $(VENV)/.times
PYTEST := $(BIN)/python -m pytest -q
PROCESSES ?= 2# of the unit and slow tests; some start ranks of their own
SPREAD = -n $(PROCESSES) --dist worksteal

# Without byte code on disk every Ray process compiles its modules anew and the start times out.
unexport PYTHONDONTWRITEBYTECODE

# $(call tier,name,command): run the command; print and keep how long it took.
define tier
@start=$$(date +%s); echo "== $(1)"; ( $(2) ) || exit $$?; \
seconds=$$(( $$(date +%s) - start )); echo "== $(1): $$seconds s"; \
printf '  %-8s %5d s\n' $(1) $$seconds >> $(TIMES)
endef

# $(call tests,options): pytest; what fails is run once more, alone, and both results are printed. A
# test that needs the second run is slower than its own limit on a loaded machine: give it more.
define tests
$(PYTEST) $(1) || { test $$? -eq 1 && echo "== what failed, once more and alone" \
	&& $(PYTEST) --last-failed --last-failed-no-failures none $(subst $(SPREAD),,$(1)); }
endef

.PHONY: help install test lint types layers unit ray slow demo bench docs format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(STAMP) ## make .venv with the tested versions (again when they change)

# torch goes first and alone, so that nothing later asks the index for another build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP) ## lint, types, layers, unit and ray tests; prints each tier's time
	@rm -f $(TIMES)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory layers
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory ray
	@echo; echo "time of each tier:"; cat $(TIMES)

lint: $(STAMP) ## ruff: rules and format
	$(call tier,lint,$(BIN)/ruff check . && $(BIN)/ruff format --check .)

types: $(STAMP) ## mypy
	$(call tier,types,$(BIN)/mypy)

layers: $(STAMP) ## import-linter: who may import whom
	$(call tier,layers,$(BIN)/lint-imports --no-logo)

# One thread a process: the models are tiny, and the numbers then do not depend on the machine.
unit ray slow: export OMP_NUM_THREADS := 1

unit: $(STAMP) ## fast tests: no network, no real model, no Ray
	$(call tier,unit,$(call tests,$(SPREAD) -m "not ray and not slow"))

ray: $(STAMP) ## tests on a local Ray cluster
	$(call tier,ray,$(call tests,-m "ray and not slow"))

slow: $(STAMP) ## tests of more than half a minute, or with the real model
	$(call tier,slow,$(call tests,$(SPREAD) -m slow))

demo: $(STAMP) ## a real 135M chat model learns who it is, on two Ray Train workers: minutes, no GPU
	@$(BIN)/python demo/run.py

bench: $(STAMP) ## start-up and memory of the loss; benchmarks/README.md has the rows that need a peer
	@$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/loss_memory.py

docs: $(STAMP) ## write docs/arguments.md and docs/arguments.schema.json from the declarations
	@$(BIN)/python -m llmray.arguments.reference

format: $(STAMP) ## ruff's formatter and its safe repairs
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## remove the environment, caches and the demo's output
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache demo/output *.egg-info
