# `make` lists the targets. Each one that runs Python first brings .venv up to date; no step needs a GPU, CUDA or root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt
JOBS ?= 2
# ninja, which builds the extension, is looked up on PATH.
export PATH := $(abspath $(BIN)):$(PATH)

# A folder of your own photographs for the demo: make demo DATA=~/Pictures
DATA ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-long gate lint format bench gpu wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.ready  ## train a mini Hiera on real photographs, stock and accelerated side by side (about 4 minutes)
	$(BIN)/python -m examples.demo --output demo $(if $(DATA),--data "$(DATA)")

# Processes of their own: Triton reads TRITON_INTERPRET when it is imported, and interpreted kernels cannot be compiled. pytest
# itself fails where a selection is empty.
test: $(VENV)/.ready  ## the whole suite but for the long sweeps
	$(BIN)/python -m pytest -n $(JOBS) -m "not interpreted and not timing and not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -m "interpreted and not timing and not slow"
	$(BIN)/python -m tests.gates --jobs $(JOBS)
	$(BIN)/python -m pytest -m "timing and not slow"

test-long: $(VENV)/.ready  ## the long sweeps that `make test` leaves out
	$(BIN)/python -m pytest -n $(JOBS) -m "slow and not interpreted"

gate: $(VENV)/.ready  ## compile every kernel for sm_80, sm_90 and sm_100 and judge the machine code (half an hour)
	$(BIN)/python -m tests.gates --all --jobs $(JOBS)

lint: $(VENV)/.ready  ## ruff, style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready  ## let ruff rewrite what lint complains of
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready  ## ops, training steps, prediction and convergence in short, with tables and plots in bench/ (4 minutes)
	$(BIN)/python -m benchmarks.ops --quick --json bench/this-machine/ops.json
	$(BIN)/python -m benchmarks.model --quick --json bench/this-machine/model.json
	$(BIN)/python -m benchmarks.roofline --model hiera_base_224 --batch 128 --plot bench/predicted.png
	$(BIN)/python -m benchmarks.convergence --steps 20 --precisions fp32 --plot bench/convergence.png
	$(BIN)/python -m benchmarks.report --of bench

gpu:  ## parity and speed on an NVIDIA GPU, with the Python of this shell (no .venv, no network)
	bash benchmarks/gpu.sh

wheel: $(VENV)/.ready  ## one abi3 wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove everything that the targets above made
	rm -rf $(VENV) .upstream build dist demo bench *.egg-info hiera_kernels/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stale when the requirements, the metadata or the C++ sources are newer. Torch comes first, with its pinned companions,
# because a package that asks for plain `torch` would otherwise choose the version.
$(VENV)/.ready: requirements/constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python >= 3.10 is needed, this is " + sys.version'
	@command -v $${CXX:-g++} >/dev/null || { echo "a C++ compiler is needed and $${CXX:-g++} was not found (Debian: apt install g++)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed (Debian: apt install python3-venv)"; exit 1; }
	@echo "[1/4] torch, triton, torchvision (minutes on a slow line)"
	@$(PIP) torch triton torchvision
	@echo "[2/4] development requirements"
	@$(PIP) setuptools wheel ninja numpy pytest pytest-xdist
	@$(PIP) $$($(BIN)/python requirements/extras.py train demo bench test)
	@echo "[3/4] the originals, as the tests' oracles: sam2, and hiera-transformer in a directory of its own (.upstream)"
	@SAM2_BUILD_CUDA=0 $(PIP) --no-deps --no-build-isolation sam2
	@rm -rf .upstream && $(PIP) --no-deps --target .upstream hiera-transformer
	@echo "[4/4] hiera_kernels with its C++ extension"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@
