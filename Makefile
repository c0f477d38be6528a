# make demo    trains a VAE on handwritten digits and draws samples
# make test    runs the tests
# Each sets up what it needs in .venv, once. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
EXTRAS := train,test,bench,lint

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz lint bench wheel cuda-check clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make fuzz | lint | bench | wheel | cuda-check | clean"

$(VENV)/.build: constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fastgen needs Python 3.10 or newer, not %d.%d" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools wheel ninja pybind11 numpy torch
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(BIN)/fastgen info | grep -E '^(build|  not|library)'
	touch $@

demo: $(VENV)/.build
	$(BIN)/fastgen train conv-vae --data digits --out runs/demo --overwrite
	$(BIN)/fastgen sample runs/demo --n 64 --out runs/demo/grid.png

# One worker for each core, up to 8: each takes about 1 GiB. WORKERS=0 runs all tests in one process.
WORKERS ?= auto
test: $(VENV)/.build
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --maxprocesses 8 --dist worksteal $(TESTS)

# Random calls of every operator and function, with a library that AddressSanitizer and UBSan watch. A failure prints
# its seed: make fuzz CALLS=1 SEED=... replays it.
CALLS ?= 10000
SEED ?= 0
fuzz: $(VENV)/.build
	$(BIN)/python -m tests.fuzz.build --calls $(CALLS) --seed $(SEED)

lint: $(VENV)/.build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -z '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -0 $(BIN)/clang-format --dry-run --Werror

bench: $(VENV)/.build
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks/suites/bench_*.py --benchmark-only -q --benchmark-json=.benchmarks/latest.json
	$(BIN)/python benchmarks/report.py .benchmarks/latest.json

# Compiles every CUDA source for each architecture; prints what each kernel uses, and on sm_80 and sm_90a fails on a
# spill or on a kernel over its budget (tests/kernel_budgets.py). Without nvcc the compiler comes from PyPI. SASS=1 adds the disassembler,
# with which instructions are counted too: make cuda-check SASS=1
CUDA_ARCH ?= 80 90a 120
CUDA_WHEELS := cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2
SASS_WHEEL := nvidia-cuda-nvdisasm==13.5.37
cuda-check: $(VENV)/.build
	command -v nvcc >/dev/null || $(PIP) install --quiet '$(CUDA_WHEELS)'
	test "$(SASS)" != 1 || $(PIP) install --quiet '$(SASS_WHEEL)'
	$(BIN)/python tests/compile_check.py $(addprefix --arch ,$(CUDA_ARCH))

wheel: $(VENV)/.build
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	rm -f fastgen/_C.*so fastgen/_cpu.*so fastgen/_cuda.*so fastgen/_build_report.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
