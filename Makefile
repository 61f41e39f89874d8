# Two commands do everything: `make train` and `make test`. Each makes .venv first if it is not there.
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETTINGS := pyproject.toml callbacks/pyproject.toml constraints.txt
CONFIG ?= configs/quickstart.yaml

.PHONY: train test test-slow lint format test-gpu bench-gpu clean

train: $(VENV)/.installed
	$(BIN)/python scripts/train.py --config $(CONFIG)

# A process a core, up to four, and a file stays in one of them; threads that wait leave the cores to the others.
test: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a machine with a GPU whose Python has what pyproject.toml asks for (and test-gpu its dev extra, but for the linters):
# no environment of our own.
test-gpu:
	PYTHONPATH=.:callbacks $(GPU_PYTHON) -m pytest -q -m gpu

bench-gpu:
	PYTHONPATH=.:callbacks $(GPU_PYTHON) scripts/benchmark.py kernels --device cuda --model smollm2-135m \
		--batch 16 --context 1024 --rounds 30 --out benchmarks/results/kernels-gpu.json
	PYTHONPATH=.:callbacks $(GPU_PYTHON) scripts/benchmark.py training --device cuda --model smollm2-135m \
		--batch 16 --context 1024 --rounds 12 --out benchmarks/results/training-gpu.json

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETTINGS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e ./callbacks -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e ./callbacks -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info callbacks/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
