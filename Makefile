PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.stamp
BENCH_STAMP := $(VENV)/.stamp-bench
BIN := $(VENV)/bin

# The pins hold in every pip run, isolated build environments included (a variable of their own since pip 25.3).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

WORKERS ?= 2
RANGE ?= 2.11.0 2.15.0
BENCH ?= --quick
PROFILE := $(if $(CI),ci,dev)

.DEFAULT_GOAL := help
.PHONY: help setup run docs test test-deep test-range lint types bench
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything, pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

run: $(STAMP) ## train a small language model and value its data in the run: runs/lm/report.html
	$(BIN)/python examples/lm_in_run_shapley.py --out runs/lm --overwrite

docs: $(STAMP) ## write the site of pages: site/index.html
	$(BIN)/python tests/docs/build_site.py --out site

test: $(STAMP) ## run the tests, the same drawn examples every time (ARGS="-k name" to choose, WORKERS=1: one process)
	HYPOTHESIS_PROFILE=$(PROFILE) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-deep: $(STAMP) ## run all cases of the tests, with many more examples, drawn anew
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-range: ## run the tests on the oldest and the newest torch, in scratch environments (RANGE="2.12.1" to choose)
	RANGE="$(RANGE)" WORKERS=$(WORKERS) tests/range.sh $(ARGS)

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

bench: $(BENCH_STAMP) ## measure, beside the alternatives of the extra `bench`: runs/bench/*.json (BENCH= takes longer)
	mkdir -p runs/bench
	set -e; for script in tests/benchmarks/bench_*.py; do \
		echo "== $$script"; \
		$(BIN)/python "$$script" $(BENCH) --out "runs/bench/$$(basename "$$script" .py).json"; \
	done
