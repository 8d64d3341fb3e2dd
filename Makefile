# A new machine needs python3 (3.11 or newer, with venv) and make; what else these targets need they install into .venv. The C++ runtime alone needs
# a C++ compiler, CMake and what cpp/prepare installs besides; without them its tests say that they are skipped.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n auto --dist worksteal

# mkdocs-material prints an advertisement for its successor otherwise.
export NO_MKDOCS_2_WARNING := 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRAIN_STAMP := $(VENV)/.installed-train
INSTALL = $(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable

.PHONY: setup demo test cpp-test check format docs clean
.DEFAULT_GOAL := setup

setup: $(STAMP)  ## make the virtual environment and install the library with everything for development

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[all,dev]'
	touch $(TRAIN_STAMP) $@

$(TRAIN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[train]'
	touch $@

demo: $(TRAIN_STAMP)  ## train the embedded default for every budget, evaluate it, draw the frontier
	$(BIN)/l2a compress train

test: setup  ## run the tests: those of the C++ runtime without sanitizers and fuzzing, then pytest
	cpp/check 'release install'
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

cpp-test: setup  ## all tests of the C++ runtime, as far as this machine has what it needs (cpp/prepare fetches it)
	cpp/check

check: setup  ## format, lint, types, import rules, docs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet

format: setup  ## format and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: setup  ## serve the documentation while writing it
	$(BIN)/mkdocs serve

clean:  ## remove what was built; the virtual environment stays
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
