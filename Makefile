# make demo: environment, install, eager beside fused on a photo.  make test: every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test interpret mutants docs install properties check clean

demo: install
	$(BIN)/mra compare

# One process a core, up to 8, each with one thread.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadscope

test: install
	OMP_NUM_THREADS=1 $(PYTEST) tests

# Triton's kernels on CPU tensors, in the interpreter of version TRITON, which the environment does not keep.
# A whole checkpoint of 384 pixels takes long: make interpret INTERPRETED=llava_hr_tiny_384-triton
TRITON ?= 3.6.0
INTERPRETED ?= triton and not llava_hr and (values or golden or test_triton)
interpret: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target build/triton-$(TRITON) triton==$(TRITON) 'numpy<2.4'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=build/triton-$(TRITON) $(PYTEST) tests -k '$(INTERPRETED)'

# 1,000 random shapes for each op; the tests draw 100.
properties: install
	PROPERTY_EXAMPLES=1000 $(BIN)/python -m pytest tests/test_properties.py

# Small changes of the CUDA sources, each of which the simulator's cases must notice; half an hour on two cores.
mutants: install
	PYTHONPATH=. $(BIN)/python tests/mutants.py

# The documentation, into site/; warnings are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What CI checks besides the tests: format, lint, types.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 'tests/*.cuh')

# Editable, so that the compiled extension lies beside the sources; made anew when what it is built from changes.
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info mra_kernels/_C.*.so
