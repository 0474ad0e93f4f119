# make demo: environment, install, eager beside fused on a photo.  make test: every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test install properties check clean

demo: install
	$(BIN)/mra compare

test: install
	$(BIN)/python -m pytest tests

# 1,000 random shapes for each op; the tests draw 100.
properties: install
	PROPERTY_EXAMPLES=1000 $(BIN)/python -m pytest tests/test_properties.py

# What CI checks besides the tests: format, lint, types.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

# Editable, so that the compiled extension lies beside the sources; made anew when what it is built from changes.
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info mra_kernels/_C.*.so
