# Everything runs inside its own virtual environment, made on first use.
# PYTHON=... picks the interpreter; without it the newest of 3.13 to 3.11 that runs here is taken
# (newer JAX is much faster on CPU), pyenv's own included.
PYTHON ?= $(shell ./tools/newest_python.sh)
VENV ?= .venv
BIN := $(VENV)/bin
DATA_DIR ?= $(HOME)/tensorflow_datasets
RUNS ?= runs

.PHONY: demo test notebooks notebooks-in-place docs lint format study clean

$(VENV)/.ready: requirements.txt requirements-dev.txt requirements-onnx.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found. Install one, or run: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python >= 3.11 is needed; {sys.executable} is {v}")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-onnx.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready requirements-docs.txt
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m msvit_jax.demo --workdir=$(RUNS)/demo --data_dir=$(DATA_DIR)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Whether the notebooks run, with few examples; writes nothing.
notebooks: $(VENV)/.ready
	$(BIN)/python tools/run_notebooks.py --fast notebooks/*.ipynb

# Runs them for real, each from nothing as in Colab, and keeps their outputs.
notebooks-in-place: $(VENV)/.ready
	for notebook in notebooks/*.ipynb; do \
	  rm -rf notebooks/runs; \
	  $(BIN)/python tools/run_notebooks.py $$notebook || exit 1; \
	done

docs: $(VENV)/.ready-docs
	rm -rf docs/_build docs/api
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

study: $(VENV)/.ready
	$(BIN)/python studies/digits.py --workdir=$(RUNS)/study --data_dir=$(DATA_DIR)

clean:
	rm -rf $(VENV) docs/_build docs/api build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
