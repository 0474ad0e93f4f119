# make demo: environment, install, eager beside fused on a photo.  make test: every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test install properties check clean

demo: install
	$(BIN)/mra compare

test: install
	$(PIP) -e '.[test]'
	$(BIN)/python -m pytest tests

# The package and its compiled extension, editable: the extension lies beside the sources.
install: $(BIN)/python
	$(PIP) -e .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# 1,000 random shapes for each op; the tests draw 100.
properties: install
	$(PIP) -e '.[test]'
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/test_properties.py

# What CI checks besides the tests: format, lint, types.
check: install
	$(PIP) '.[dev]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

clean:
	rm -rf $(VENV) build dist *.egg-info mra_kernels/_C.*.so
