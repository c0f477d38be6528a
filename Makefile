# make demo    trains a VAE on handwritten digits and samples it
# make test    runs the tests
# Each installs what it needs into .venv, once. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what is imported, at the first import: compiling all of torch takes pip longer than unpacking it.
INSTALL := $(PIP) install --quiet --no-compile
SOURCES := $(shell find csrc -type f) setup.py tools/build_libraries.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test integrations pytorch-tests examples fuzz lint bench bench-suites docs wheels cuda-check clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make lint | docs | integrations | pytorch-tests | examples | fuzz | bench | bench-suites | wheels | cuda-check | clean"

# Three stamps: the package with what training needs; what tests, lint and benchmarks add; what the site needs.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fastgen needs Python 3.10 or newer, not %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build: constraints.txt $(SOURCES) | $(BIN)/python
	$(INSTALL) -c constraints.txt setuptools wheel ninja numpy torch
	$(INSTALL) -c constraints.txt --no-build-isolation --editable '.[train]'
	@$(BIN)/fastgen info | grep -E '^(build|  not|library)'
	touch $@

# fastgen is installed already: pip adds the requirements of its extras and does not build again.
$(VENV)/.dev: $(VENV)/.build
	$(INSTALL) -c constraints.txt 'fastgen[test,bench,lint,release]'
	touch $@

# The site is built from the sources alone, without PyTorch. The same packages as the extra docs.
$(VENV)/.docs: constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

demo: $(VENV)/.build
	$(BIN)/fastgen train conv-vae --data digits --out runs/demo --overwrite
	$(BIN)/fastgen sample runs/demo --n 64 --out runs/demo/grid.png

# One worker for each core, up to 8: each takes about 1 GiB. WORKERS=0 runs all tests in one process.
WORKERS ?= auto
test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --maxprocesses 8 --dist worksteal $(TESTS)

# Models of transformers, diffusers, timm and x-transformers, and export to ONNX; make test skips what is not installed.
# A torchvision that does not match torch breaks transformers too: it is removed, and the tests of timm are skipped.
$(VENV)/.integrations: $(VENV)/.dev
	$(INSTALL) -c constraints.txt 'fastgen[integrations]'
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(PIP) uninstall --quiet --yes torchvision
	touch $@

integrations: $(VENV)/.integrations
	$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal tests/integrations

# PyTorch's own tests of attention and recurrent layers, with fastgen in the place of torch:
# make pytorch-tests CHECKOUT=../pytorch
pytorch-tests: $(VENV)/.dev
	test -d "$(CHECKOUT)" || { echo "make pytorch-tests CHECKOUT=<a checkout of PyTorch>"; exit 1; }
	$(INSTALL) -c constraints.txt expecttest
	PYTORCH_TESTS='$(abspath $(CHECKOUT))' $(BIN)/python -m pytest -q -s -m slow tests/pytorch

# The scripts of examples/, for a few steps each.
examples: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/docs/test_examples.py

# Random calls of every operator and function, with a library that AddressSanitizer and UBSan watch. A failure prints
# its seed: make fuzz CALLS=1 SEED=... replays it.
CALLS ?= 10000
SEED ?= 0
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz.build --calls $(CALLS) --seed $(SEED)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/word_lint.py
	$(BIN)/python -m tests.test_option_helps
	git ls-files -z '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -0 $(BIN)/clang-format --dry-run --Werror

# One table of what fastgen should reach against PyTorch on this CPU, in about six minutes, on an idle machine. Also
# writes benchmarks/results/CPU-CORES-DATE-LEVEL.json. FASTGEN_CPU=avx2 make bench holds both to AVX2.
# make bench-suites measures everything else: other shapes, memory, layers, models, the host's time before a launch.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.targets --save

bench-suites: $(VENV)/.dev
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks/suites/bench_*.py --benchmark-only -q --benchmark-json=.benchmarks/latest.json
	$(BIN)/python benchmarks/report.py .benchmarks/latest.json
	PYTHONPATH=. $(BIN)/python benchmarks/host_path.py

# The documentation, into site/. Fails on a warning. (The variable silences an advertisement of the theme.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Compiles every CUDA source for each architecture; prints what each kernel uses, and on sm_80 and sm_90a fails on a
# spill, on a kernel over its budget (tests/kernel_budgets.py) and on a main loop with too many instructions. The kernels
# of the last architecture are those of a wheel that is built. Without nvcc the compiler comes from PyPI, and so does the
# disassembler. make cuda-check SASS=1 counts the instructions of all kernels instead of building a wheel.
# CUDA_DTYPES="bfloat16 float32" leaves out the sources of float16 where no wheel is built; a wheel has all dtypes.
CUDA_ARCH ?= 80 90a 120
CUDA_DTYPES ?=
CUDA_WHEELS := cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2
SASS_WHEEL := nvidia-cuda-nvdisasm==13.5.37
cuda-check: $(VENV)/.dev
	command -v nvcc >/dev/null || $(INSTALL) '$(CUDA_WHEELS)'
	$(INSTALL) '$(SASS_WHEEL)'
	$(BIN)/python tests/compile_check.py $(addprefix --arch ,$(CUDA_ARCH)) $(addprefix --dtype ,$(CUDA_DTYPES)) \
		$(if $(SASS),--sass,--wheel $(lastword $(CUDA_ARCH)))

# The wheels of a release that this machine can build, checked: into dist/. On two cores nvcc compiles cu130 in about 25
# minutes and cu12-smoke in 10; make wheels WHEELS=cpu takes two. PYTHON has to be 3.11 or newer.
WHEELS ?= cpu cu12-smoke cu130
wheels:
	for variant in $(WHEELS); do PYTHON=$(PYTHON) tools/release.sh $$variant || exit 1; done

clean:
	rm -rf $(VENV) build dist runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	rm -f fastgen/*.so fastgen/_build_report.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
