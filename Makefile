# Each target sets up what it needs in .venv, and is quick when run again.
PYTHON ?= python3
MARKS ?= not slow
# A process for each core: a file's tests stay together, since they share what they export, and files of long tests come first.
PROCESSES ?= --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo robustness test lint format docs metrics
.DELETE_ON_ERROR:

demo: .venv/installed-export  ## export a small model, verify it, find objects with it
	$(BIN)/python -m tood_deploy.demo

test: .venv/installed-dev  ## the tests but the slow ones; MARKS= runs all
	$(BIN)/python -m pytest -m "$(MARKS)" $(PROCESSES)

lint: .venv/installed-dev  ## what every commit must pass
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

robustness: .venv/installed-dev  ## mutated inputs, kills and signals; goes on where it stopped; ARGS="--minutes 10"
	PYTHONPATH=tests $(BIN)/python -m robustness --report docs/results/robustness.md $(ARGS)

metrics: .venv/installed-dev  ## sizes, import lines, typing, documentation, counted
	$(BIN)/python .ci/metrics.py

format: .venv/installed-dev  ## format the code, and mend what can be mended automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-docs  ## the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/installed-export: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable '.[export,eval]'
	touch $@

.venv/installed-dev: .venv/installed-export
	$(PIP_INSTALL) --editable '.[export,eval,train,serve,dev]'
	touch $@

.venv/installed-docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@
