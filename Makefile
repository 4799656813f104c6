# `make` lists what can be made; each target stands alone on a fresh machine with python3, g++ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install test bench soak lint gpu-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) || { echo "tranche: $(PYTHON) cannot make virtual environments; install python3-venv."; exit 1; }

install: $(BIN)/python  ## make .venv and bring it up to date: dependencies, this package, the simulator
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel cmake ninja pybind11 numpy rich matplotlib \
		pytest pytest-timeout hypothesis scipy transformers scikit-learn onnx onnxruntime onnxscript
	PATH="$(CURDIR)/$(BIN):$$PATH" TRANCHE_SIM=1 $(PIP) install --quiet --no-build-isolation --no-deps --editable .

test: install  ## run the tests (TESTS="tests/tree -k chain" for some)
	$(BIN)/python -m pytest $(or $(TESTS),-m "not soak")

soak: install  ## run the tests that take long
	$(BIN)/python -m pytest -m soak --timeout 7200

bench: install  ## run the microbenchmarks and write build/bench/report.md (QUICK=1 for a few rows, ARGS="tree --vs sdpa")
	$(BIN)/python -m benchmarks $(ARGS) $(if $(QUICK),--quick) --report build/bench

lint: install  ## ruff, clang-format and mypy
	$(PIP) install --quiet --constraint constraints.txt ruff clang-format mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' | grep -E '\.(h|cpp|cuh|cu)$$' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

gpu-check:  ## on a machine with a GPU: build for it, test, check and measure
	tools/gpu_check.sh

clean:  ## remove what was built, but not .venv
	rm -rf build python/tranche/*.so python/*.egg-info
