# Installs, trains and tests from a fresh checkout: `make train`, `make test`, `make check`.
# Needs Python 3.11 to 3.13 with venv; uses uv if it is installed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Stamps are written last, so that an interrupted installation is repeated.
STAMP := $(VENV)/installed
DEV_STAMP := $(VENV)/installed-dev
ACCELERATORS := .cache/accelerators
SUITES_VENV := .cache/suites
SUITES := ale brax craftax envpool gymnasium jaxmarl jaxtari jumanji navix octax pgx playground xminigrid
# One worker per core, because compiling, which is most of the suite, uses one core; and 2.5 GiB of
# memory for each.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); \
	fit=$$(awk '/MemAvailable/ {print int($$2 / 2621440)}' /proc/meminfo 2>/dev/null); \
	fit=$${fit:-$$cores}; fit=$$((fit < 1 ? 1 : fit)); echo $$((fit < cores ? fit : cores)))

.PHONY: help install train test test-slow test-suites test-launchers test-accelerators test-fuzz soak accelerators lint types docs package guard check lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## make .venv and install the package with its dependencies

train: $(STAMP)  ## train PPO on CartPole-v1 and evaluate it
	@$(BIN)/ppo-jax train CartPole-v1

test: $(DEV_STAMP)  ## run the tests and doctests
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

test-slow: $(DEV_STAMP)  ## run learning runs, which take minutes each
	@$(BIN)/python -m pytest -q -m slow

test-suites: $(SUITES_VENV)/installed  ## install every suite of environments, and test the adapters
	@$(SUITES_VENV)/bin/python -m pytest -q -n $(WORKERS) -m "slow or not slow" tests/test_suites.py \
		tests/test_host_suites.py

test-launchers: $(DEV_STAMP)  ## install Ray and PostgreSQL, and test what runs on several machines
	@$(BIN)/python -m pip install -q "ray>=2.50,<3" "pgserver>=0.1.4" "psycopg2-binary>=2.9"
	@$(BIN)/python -m pytest -q -m "slow or not slow" tests/test_launchers.py tests/test_processes.py

test-accelerators: $(ACCELERATORS)/installed  ## compile for GPUs and TPUs, and check that no training has more kernels
	@JAX_PLATFORMS=cpu $(ACCELERATORS)/bin/python -m pytest -q -m slow tests/test_accelerators.py

test-fuzz: $(DEV_STAMP)  ## try 1,000 inputs for every kind of file and setting
	@FUZZ=1000 $(BIN)/python -m pytest -q tests/test_hostile.py

soak: $(DEV_STAMP)  ## train for half an hour, and check that nothing grows or slows down
	@$(BIN)/python benchmarks/soak.py --minutes 30

accelerators: $(ACCELERATORS)/installed  ## count the kernels and the memory of GPUs and TPUs, by compiling for them
	@$(ACCELERATORS)/bin/python benchmarks/ahead_of_time.py --target h100 \
		--json benchmarks/results/ahead-of-time.json
	@$(ACCELERATORS)/bin/python benchmarks/ahead_of_time.py --target a100 \
		--json benchmarks/results/ahead-of-time-others.json
	@$(ACCELERATORS)/bin/python benchmarks/ahead_of_time.py --target v5e v6e \
		--json benchmarks/results/ahead-of-time-tpu.json
	@$(ACCELERATORS)/bin/python benchmarks/memory_plan.py --json benchmarks/results/memory-plan.json
	@JAX_PLATFORMS=cpu $(ACCELERATORS)/bin/python -m tests.tpu_checks benchmarks/results/tpu-programs.json

lint: $(DEV_STAMP)  ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV_STAMP)  ## check types
	@$(BIN)/mypy

docs: $(DEV_STAMP)  ## build the documentation, strictly, in .cache/site
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/zensical build --strict

package: $(DEV_STAMP)  ## build wheel and sdist, and try both in clean environments
	@PYTHON="$(PYTHON)" scripts/check_package $(BIN)

guard: $(DEV_STAMP)  ## check that no training has become slower
	@$(BIN)/python benchmarks/guard.py

check: test lint types docs package guard  ## run everything that CI checks

$(STAMP): pyproject.toml requirements.lock
	@PYTHON="$(PYTHON)" scripts/install $(VENV) requirements.lock
	@touch $@

$(DEV_STAMP): $(STAMP) requirements-dev.lock
	@PYTHON="$(PYTHON)" scripts/install $(VENV) requirements-dev.lock
	@touch $@

$(SUITES_VENV)/installed: requirements-suites.lock
	@PYTHON="$(PYTHON)" scripts/install $(SUITES_VENV) requirements-suites.lock
	@touch $@

$(ACCELERATORS)/installed: requirements-dev.lock benchmarks/requirements-accelerators.txt
	@PYTHON="$(PYTHON)" scripts/install $(ACCELERATORS) benchmarks/requirements-accelerators.txt
	@touch $@

lock:  ## write the lock files again (needs uv)
	uv lock
	uv export --quiet --no-hashes --no-emit-project --no-dev --output-file requirements.lock
	uv export --quiet --no-hashes --no-emit-project --output-file requirements-dev.lock
	uv export --quiet --no-hashes --no-emit-project $(SUITES:%=--extra %) --output-file requirements-suites.lock

clean:  ## remove the environment and caches
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache
