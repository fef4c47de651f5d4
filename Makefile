# The three stages, and what development needs. `make` alone lists the targets.
PYTHON ?= python3
RECIPE ?= demo
SET ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEV_STAMP := $(VENV)/installed-dev
SAIL := $(BIN)/sail
TYPESCRIPT := 7.0.2
TSC := $(VENV)/typescript-$(TYPESCRIPT)/node_modules/typescript/bin/tsc
PACKAGES := pipeline features align evaluate
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install extract align eval demo test test-slow check format figures check-figures figures-gpu clean

help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-13s %s\n", $$1, $$2}'
	@echo "  RECIPE=demo|sail-small|sail|sail-paper|path/to/run.toml   SET='--set section.key=value'"

install: $(STAMP) ## Make .venv with what running needs

extract: $(STAMP) ## Stage one: images and captions -> feature stores
	$(SAIL) extract $(RECIPE) $(SET)

align: $(STAMP) ## Stage two: feature stores -> trained head
	$(SAIL) align $(RECIPE) $(SET)

eval: $(STAMP) ## Stage three: stores and head -> results.json and report.html
	$(SAIL) eval $(RECIPE) $(SET)

demo: ## All three stages on the embedded demo world, offline, on a CPU
	@$(MAKE) --no-print-directory extract align eval RECIPE=demo
	@echo "Look at it in a browser: $(SAIL) explore runs/demo"

test: $(DEV_STAMP) ## The fast tests, minutes; none needs a network or a GPU
	$(PYTEST) -m "not slow and not network and not gpu"

test-slow: $(DEV_STAMP) ## The other tests: storms, kills, browsers, processes of torch
	$(PYTEST) -m "slow and not network and not gpu"

check: $(DEV_STAMP) $(TSC) ## Lint, format and types, as CI runs them; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/node $(TSC) -p pipeline/explore/jsconfig.json

format: $(DEV_STAMP) ## Rewrite the code into the house style, and docs/recipes.md from the settings
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m pipeline.reference > docs/recipes.md.partial
	mv docs/recipes.md.partial docs/recipes.md

figures: $(DEV_STAMP) ## Measure what stands for our goals; writes docs/figures.json
	$(BIN)/python -m tests.benchmarks.figures

check-figures: $(DEV_STAMP) ## The same, compared with the goals; writes nothing
	$(BIN)/python -m tests.benchmarks.figures --check

figures-gpu: ## The same on a CUDA machine (installs nothing)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.benchmarks.figures --gpu

clean: ## Remove caches and build output; keeps .venv and runs
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks build *.egg-info

# Of mistral-common the tests need a data file only, and not the old numpy that it asks for.
# The stamps make `make demo` do nothing a second time. Only pip's own wheels are installed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; call make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps mistral-common
	touch $@

# What checks the types of the page's JavaScript. Node.js is one of the wheels of the extra `dev`,
# so this check is skipped nowhere; the compiler comes from npm, once.
$(TSC): | $(DEV_STAMP)
	$(BIN)/npm install --loglevel error --no-audit --no-fund --no-save --no-package-lock --prefix $(VENV)/typescript-$(TYPESCRIPT) typescript@$(TYPESCRIPT)
