# `make story` and `make test` set up everything they need in .venv, from a fresh clone with Python 3.11+ and a package index.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal
# Images of containers forbid files of bytecode; without them each of the tests' processes compiles every module again.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help env story test test-all coverage check format wasm docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: .venv/ready ## set up .venv, for the command gemmule
	@echo "ready; next:  source .venv/bin/activate  and then  gemmule --help"

story: .venv/ready ## train a Gemma 3 on the embedded corpus (CPU, minutes), draw its curves, let it tell stories
	$(BIN)/gemmule train recipes/story.toml --out runs/story --resume

test: .venv/ready-dev ## the quick tests, about three minutes
	$(PYTEST) -m "not slow"

test-all: test .venv/ready-all ## also the slow tests: parity with transformers and llama.cpp, Google's weights, memory, whole runs
	$(PYTEST) -m slow

coverage: .venv/ready-dev ## branch coverage of the quick tests, which must not fall below its floor in pyproject.toml
	$(PYTEST) -m "not slow" --cov --cov-report=term

check: .venv/ready-dev ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/ready-dev ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wasm: .venv/ready-all ## make step.wasm of the pages again, after a change of step.c or sample.c
	$(BIN)/python -m gemmule.formats.wasm src/gemmule/formats/run/step.wasm

docs: .venv/ready-dev ## make docs/settings.md, and check that the documentation's links and commands exist
	$(BIN)/gemmule settings --markdown > docs/settings.md
	$(BIN)/pytest tests/architecture/test_documentation.py

clean: ## remove the environment and caches, never runs/
	rm -rf .venv build dist .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# The environment: one for users, the same with the developers' tools on top.

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
	  sys.version_info >= (3, 11) or sys.exit("Gemmule needs Python 3.11 or newer; this is " + v + ": make PYTHON=python3.12 ...")'
	@echo "setting up .venv ..."
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing Gemmule and what it needs (a minute or two the first time) ..."
	$(INSTALL) --editable '.[plots,gguf]'
	@touch $@

.venv/ready-dev: .venv/ready
	$(INSTALL) --editable '.[dev]'
	@touch $@

# Google's weights, the clients of tracking services, and llama.cpp, which is built here: where it cannot be, its tests say so and are skipped.
.venv/ready-all: .venv/ready-dev
	$(INSTALL) --editable '.[dev,google,lm-eval,ray,wandb,mlflow,trackio,clients,trainers,program,verify]'
	$(INSTALL) --editable '.[dev,browser]' || echo "playwright could not be installed; the tests in a browser will be skipped"
	@echo "building llama.cpp (some minutes the first time) ..."
	$(INSTALL) --editable '.[dev,google,lm-eval,ray,wandb,mlflow,trackio,clients,trainers,program,verify,llama]' || echo "llama.cpp could not be built; its tests will be skipped"
	@touch $@
