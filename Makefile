# make demo, make test: each is sufficient alone in a fresh clone. Needs Python >= 3.10 and, for the
# compiled kernels, a C++20 compiler (and nvcc for CUDA's).
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# Where torch comes from is the user's pip configuration; PIP_ARGS adds to it, for example the index
# of PyTorch's CPU builds.
PIP    := $(PY) -m pip --disable-pip-version-check install -q $(PIP_ARGS)
TESTS  ?= tests
# Processes that share the tests; each uses two threads.
JOBS   ?= 2

.PHONY: install demo test lint format cuda-compile clean

install: $(VENV)/.installed

# torch first and by its exact version: its build decides the rest. The extension is rebuilt by ninja
# when a source of it changed.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(shell grep '^torch==' constraints.txt)
	$(PIP) -c constraints.txt setuptools ninja pybind11
	$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: install
	$(PY) -m compressops.demo

test: install
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(TESTS)

lint: install
	$(PY) -m ruff check --no-cache .
	$(PY) -m ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: install
	$(PY) -m ruff check --no-cache --fix .
	$(PY) -m ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

# Every .cu for every architecture, warnings as errors; fails where nvcc is missing.
cuda-compile: install
	COMPRESSOPS_CPP=0 COMPRESSOPS_CUDA=1 $(PY) setup.py -q build_ext --inplace

clean:
	rm -rf build $(VENV)/.installed
