# make ab    own virtual environment, install, then the A/B speed test of a GPT against stock JAX
# make test  the same environment with test tools: ruff, pyright, the suite
# make sanitize      the kernels' tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer
# make cuda          compiles the CUDA kernels where nvcc is found; no GPU is needed
# make gpu           programs compiled for a GPU and read, with JAX's CUDA plugin (4 GB; a VENV of its own); no GPU is needed
# make compat        upstream projects' own tests, on stock JAX and on jaxext, compared; writes docs/compat.md
# make compat-quick  a few minutes of them
# Variables: PYTHON (an interpreter >= 3.11), VENV (where), JAX_VERSION (a pin; newest by default), TESTS (options of
#   pytest), COMPAT (options of compat/run.py, such as "--suite optax").

SUITABLE := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c "$(SUITABLE)" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
JAX_VERSION ?=
PIN := $(if $(JAX_VERSION),"jax==$(JAX_VERSION)" "jaxlib==$(JAX_VERSION)")
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(shell find native jaxext jaxext-stubs -name '*.py' -o -name '*.cc' -o -name '*.cu' -o -name '*.h' \
	-o -name '*.inc' -o -name '*.pyi' -o -name CMakeLists.txt)

.PHONY: ab test check sanitize cuda gpu compat compat-quick clean

ab: $(VENV)/ab.stamp
	$(BIN)/jaxext ab compat/programs/gpt_nnx.py:factory --budget 200 --html report.html --png report.png

test: $(VENV)/test.stamp check
	$(BIN)/pytest -n 2 --dist worksteal $(TESTS)

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

sanitize: $(VENV)/test.stamp
	native/sanitize.sh $(BIN)/python $(TESTS)

cuda: $(VENV)/bin/python
	@if command -v nvcc >/dev/null; then $(MAKE) --no-print-directory build/cuda/compiled; \
	else echo "no nvcc here: the CUDA kernels were not compiled"; fi

build/cuda/compiled: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "nanobind>=2.4" cmake ninja jaxlib
	PATH="$(abspath $(BIN)):$$PATH" cmake -S native -B build/cuda -G Ninja -DJAXEXT_CUDA=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cuda --target _native_cuda
	PYTHONPATH=build/cuda $(BIN)/python -c "import _native_cuda; print(*_native_cuda.targets())"
	@touch $@

gpu: $(VENV)/gpu.stamp
	$(BIN)/pytest tests/gpu $(TESTS)

$(VENV)/gpu.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[test]" "jax[cuda13]$(JAX_VERSION:%===%)"
	@if command -v nvcc >/dev/null; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps ./native/cuda; \
	else echo "no nvcc here: without the CUDA kernels"; fi
	@touch $@

compat: $(VENV)/test.stamp
	$(BIN)/python compat/run.py --write-docs $(COMPAT)

compat-quick: $(VENV)/test.stamp
	$(BIN)/python compat/run.py --quick $(COMPAT)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[$*]" $(PIN)
	@touch $@

clean:
	rm -rf $(VENV) build
