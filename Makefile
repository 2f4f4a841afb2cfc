# Everything runs from here: `make demo`, `make test`, `make lint`. Needed: make and Python 3.11 to 3.13.

DEPLOYMENT ?= embedded
STATE ?= .tokentape-services
PYTEST_ARGS ?=
WORKERS ?= 2
SEEDS ?= 200
DAYS ?= 365
ROOMS = schemas store ingest replay lifecycle tokentape
CODE = $(ROOMS) scripts $(wildcard tests benchmarks)
BIN = .venv/bin
PYTHON = $(BIN)/python
UV = env -u UV_FIND_LINKS -u PIP_FIND_LINKS -u VIRTUAL_ENV $(BIN)/uv
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
UPGRADE = $(if $(PACKAGE),$(if $(filter all,$(PACKAGE)),--upgrade,--upgrade-package $(PACKAGE)))

.DEFAULT_GOAL := help
.PHONY: help setup up demo page docs test lint simulate custody versions bench services-up services-down lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: .venv/stamp ## make .venv and install everything that is locked, vLLM for CPUs included

# A second run is instant: only another lock, another pyproject or another setup script makes this run again.
.venv/stamp: pyproject.toml locks/boot.txt locks/engine.txt scripts/setup.sh
	@sh scripts/setup.sh
	@touch $@

up: setup ## run tokentape: gateway, API and page, indexer, scheduler
	@$(BIN)/tokentape up

demo: setup ## show all of it on real input (DEPLOYMENT=embedded or distributed; OPEN=1 opens the page at the end)
	@$(PYTHON) -m scripts.demo --deployment $(DEPLOYMENT) $(if $(OPEN),--open)

# Users need no Node: the bundle is committed, and a test finds one that was not built from these sources.
page: ## build the page anew from tokentape/ui (needs Node and npm)
	@cd tokentape/ui && npm ci --silent && npm run --silent build

docs: setup ## build the site of docs/ into site/ (with pictures where SCREENSHOTS=docs/screenshots pytest tests/test_page.py left some)
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet && echo site/index.html

# A file stays with one worker, so that what its tests share is made once; the order is kept, for files that need vLLM come last.
test: setup ## run all tests, on services that are started and stopped for it (WORKERS=0: in one process)
	@$(PYTHON) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup ## ruff, mypy --strict, and the arrows between the rooms
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict $(CODE)
	@$(BIN)/lint-imports

# Iteration over sets goes by the hash seed: fixed, so that a seed is the same run here and in every worker.
simulate: setup ## faults by seed on the real pipeline: SEEDS=5000 prints a table, SEED=123 one run with its trace
	@PYTHONHASHSEED=0 $(PYTHON) -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --workers $(WORKERS))

custody: setup ## a simulated year: policies, a hold, an erasure, proof (DEPLOYMENT=embedded: without MinIO; DAYS=365)
	@$(PYTHON) -m scripts.custody --days $(DAYS) --deployment $(if $(filter command environment,$(origin DEPLOYMENT)),$(DEPLOYMENT),distributed)

versions: setup ## run capture and replay with every supported version of vLLM (hours and 20 GB; VERSIONS="0.24.0 0.31.0": only these)
	@$(PYTHON) -m tests.versions $(VERSIONS) --serve --out benchmarks/results/versions.md

bench: setup ## measure, beside the baselines
	@$(PYTHON) -m benchmarks

services-up: setup ## start Kafka, MinIO and vLLM, and leave them running (state in $(STATE))
	@$(PYTHON) scripts/services.py up --state $(STATE) kafka minio vllm

services-down: ## stop what services-up started, and only that
	@$(or $(wildcard $(PYTHON)),python3) scripts/services.py down --state $(STATE)

# Names, versions and hashes only: a registry's address belongs to the machine, not to the lock.
# The largest lock comes first and binds the others, so that all agree on every version.
lock: setup ## write locks/*.txt anew from pyproject.toml (PACKAGE=name moves one of them forward, PACKAGE=all every one)
	@$(COMPILE) $(UPGRADE) pyproject.toml --group test --group engine -o locks/engine.txt
	@$(COMPILE) $(UPGRADE) pyproject.toml -c locks/engine.txt -o locks/core.txt
	@$(COMPILE) $(UPGRADE) pyproject.toml --group test -c locks/engine.txt -o locks/test.txt
	@$(COMPILE) $(UPGRADE) --group boot -c locks/engine.txt -o locks/boot.txt
	@$(COMPILE) $(UPGRADE) --group tools -o locks/tools.txt
	@$(COMPILE) $(UPGRADE) --group rivals -o locks/rivals.txt

clean: ## remove caches of the tools (never data, never .venv)
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
