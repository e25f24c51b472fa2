# `make demo` and `make test` need Python >= 3.11 and a package index, nothing else: they make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-all lint format bench docs clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tag2mask needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## built-in scenes: tags -> CAMs -> masks -> segmenter -> report (minutes on a CPU)
	$(BIN)/tag2mask demo --work work

lint: $(INSTALLED) ## style, types, import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## everything that a change must pass
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: lint ## the same and the slow tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m ''

format: $(INSTALLED) ## rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## the benchmarks, each beside its rival
	@for file in benchmarks/*.py; do case $$file in */scene_sheet.py|*/picture.py|*/peak.py) ;; *) echo "== $$file"; $(BIN)/python $$file || exit 1;; esac; done

docs: $(INSTALLED) ## the pages, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

clean: ## remove the virtual environment and caches (never your work folders)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
