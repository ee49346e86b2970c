# Every target sets up what it needs in .venv, once, at the versions pinned in constraints.txt.
# `make demo` and `make test` are the two commands to know; `make help` lists the rest.

PYTHON ?= python3
# Another version of torch than the pinned one, as in TORCH=2.15.0, gets an environment of its own beside .venv.
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH  ?= $(PINNED)
ifeq ($(TORCH),$(PINNED))
VENV   := .venv
PINS   := constraints.txt
EXTRAS := '.[dev,demo,bench]'
# Of torchtitan the tests need its checkpoint manager, and of all that torchtitan asks for these two.
ALONE  := 'torchtitan; python_version >= "3.11"' docstring_parser tyro
else
VENV   := .venv-torch$(TORCH)-python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS   := $(VENV)/constraints.txt
EXTRAS := '.[dev,demo]' simpy
ALONE  :=
endif
# Where else builds of torch are, for instance https://download.pytorch.org/whl/cu130; by default your pip configuration decides.
TORCH_INDEX ?=
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
ARGS   ?=
# Test processes side by side. Most tests wait, for disks, deadlines and each other; a debugger wants JOBS=0.
JOBS   ?= 3
# Processes beside the tests that only compute: with twice the number of cores, a machine where much else is going on.
BUSY   ?= 0

PYTHON_STAMP := $(VENV)/.stamp-python
NATIVE_STAMP := $(VENV)/.stamp-native

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint docs bench gpu report-gpu asan tsan device-stress wheel clean distclean

help:
	@echo "make demo    train a small model, kill it, resume it, compare with torch.save"
	@echo "make test    run the tests           (make test ARGS='-k fence -x'; with another torch: TORCH=2.15.0)"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the site of docs/, into build/docs"
	@echo "make bench   run the benchmarks      (make bench ARGS=...)"
	@echo "make gpu     on a machine with an NVIDIA GPU: all checks and benchmarks that need one, in 20 minutes"
	@echo "make asan    native stress program under the address and undefined-behaviour sanitizers"
	@echo "make tsan    the same under the thread sanitizer"
	@echo "make device-stress  jobs on a strict model of the CUDA driver (SECONDS=60 SEED=1)"
	@echo "make wheel   build an sdist and manylinux wheels into dist/, for each Python from 3.10 to 3.13 that is here"
	@echo "make setup   only prepare .venv      (make setup PYTHON=python3.12)"
	@echo "make clean   remove what was built;  make distclean removes .venv too"

setup: $(NATIVE_STAMP)

demo: $(NATIVE_STAMP)
	$(PY) examples/demo.py $(ARGS)

test: $(NATIVE_STAMP)
	$(if $(filter-out 0,$(BUSY)),$(PY) tests/beside.py $(BUSY)) $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(NATIVE_STAMP)
	$(PY) -m bench.run $(ARGS)

# With an environment of its own, because its torch must be built for CUDA. Without a GPU nothing is installed.
gpu:
	$(if $(shell command -v nvidia-smi),,$(error make gpu needs a machine with an NVIDIA GPU and its driver, and finds no nvidia-smi here))
	@$(MAKE) --no-print-directory VENV=.venv-gpu$(if $(filter-out $(PINNED),$(TORCH)),-torch$(TORCH)) EXTRAS='. numpy pytest' ALONE= report-gpu

report-gpu: $(NATIVE_STAMP)
	$(PY) -m bench.gpu_report.run $(ARGS)

lint: $(PYTHON_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Any warning, as of a link that leads nowhere, is an error.
docs: $(NATIVE_STAMP)
	$(PY) -m sphinx -q -W --keep-going docs build/docs
	@echo build/docs/index.html

clean:
	rm -rf build dist *.egg-info ckpt/_native*.so $(NATIVE_STAMP) .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find ckpt integrations tests examples bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf .venv .venv-torch* .venv-gpu*

SECONDS ?= 60
SEED    ?= 1

device-stress: $(NATIVE_STAMP)
	PYTHONPATH=tests:tests/devices $(PY) tests/devices/device_stress.py --seconds $(SECONDS) --seed $(SEED) $(ARGS)

# ---- environment -----------------------------------------------------------------------------------------------------

define CHECK_PYTHON
command -v $(PYTHON) >/dev/null || \
	{ echo "make: $(PYTHON) not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "make: $$($(PYTHON) --version 2>&1) is too old: Python 3.10 or newer is needed. Name one: make PYTHON=python3.12" >&2; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "make: $(PYTHON) cannot make virtual environments. Install its venv package (python3-venv on Debian)." >&2; exit 1; }
endef

define CHECK_COMPILER
command -v $(firstword $(CXX)) >/dev/null || \
	{ echo "make: no C++ compiler: $(firstword $(CXX)) not found. Install g++ or clang++, or name one: make CXX=clang++" >&2; exit 1; }
endef

define CHECK_PYTHON_HEADERS
$(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	{ echo "make: Python.h not found. Install the development package of this Python (python3-dev on Debian)." >&2; exit 1; }
endef

# For another torch the pins hold, but for what torch brings with it. (What the benchmarks compare with has ideas of its own
# about torch, and is left out; the tests of those benchmarks skip.)
define LIFT_PINS
test $(PINS) = constraints.txt || \
	{ echo "torch==$(TORCH)"; sed -e '/^torch==/d' -e '/^# What torch pulls in/,/^$$/d' constraints.txt; } > $(VENV)/constraints.txt
endef

# Packages, and the editable install. Setting up again with the same pins installs nothing.
$(PYTHON_STAMP): constraints.txt pyproject.toml setup.py
	@$(CHECK_COMPILER)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then $(CHECK_PYTHON); echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); fi
	@$(CHECK_PYTHON_HEADERS)
	@$(LIFT_PINS)
	@echo "Installing torch==$(TORCH) and what else is needed into $(VENV) (once)"
	$(PIP) install -q -c $(PINS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==$(TORCH)
	$(PIP) install -q -c $(PINS) setuptools wheel pybind11
	LAZYCKPT_BUILD=dev $(PIP) install -q -c $(PINS) --no-build-isolation -e $(EXTRAS)
	$(if $(ALONE),$(PIP) install -q -c $(PINS) --no-deps $(ALONE))
	@touch $@

# The native module of the editable install, as a development build.
$(NATIVE_STAMP): $(PYTHON_STAMP) $(shell find csrc -type d -o -name '*.cc' -o -name '*.h')
	@$(CHECK_COMPILER)
	LAZYCKPT_BUILD=dev $(PY) setup.py -q build_ext --inplace
	@touch $@

# ---- wheels ----------------------------------------------------------------------------------------------------------

# Of these, those that are here: where python3.12 does not run, the newest one that pyenv has.
WHEEL_PYTHONS ?= 3.10 3.11 3.12 3.13
DIST          ?= dist
WHEELS        := build/wheels

# Pythons of their own with the pinned tools alone. What one compiles is kept under build/ and used again.
define WHEEL_OF
python=python$(1); \
$$python -c '' 2>/dev/null || python=$$(ls $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$(1).*/bin/python$(1) 2>/dev/null | sort -V | tail -n 1); \
if [ -z "$$python" ]; then echo "No python$(1) is here: no wheel for it"; else \
	echo "Building for $$($$python --version)" && rm -rf build/lib.* build/bdist.* && $$python -m venv $(WHEELS)/python$(1) && \
	$(WHEELS)/python$(1)/bin/python -m pip install -q -c constraints.txt setuptools wheel pybind11 packaging && \
	LAZYCKPT_BUILD=release $(WHEELS)/python$(1)/bin/python -m pip wheel -q --no-build-isolation --no-deps -w $(WHEELS)/plain .; \
fi
endef

# What auditwheel finds decides which machines a wheel is for: the oldest C library that has what the compiler has put in.
wheel: $(PYTHON_STAMP)
	@rm -rf $(WHEELS) $(DIST)/lazyckpt-* && mkdir -p $(WHEELS)/plain $(DIST)
	@$(foreach version,$(WHEEL_PYTHONS),$(call WHEEL_OF,$(version)) &&) true
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --strip -w $(DIST) $(WHEELS)/plain/*.whl
	$(PY) -c "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])" $(DIST) >/dev/null
	@ls $(DIST)/lazyckpt-*

# ---- sanitizers ------------------------------------------------------------------------------------------------------

# The whole core without its Python bindings, and a program that stresses it.
STRESS_SOURCES := $(filter-out csrc/bindings/% csrc/pickle/%,$(sort $(wildcard csrc/*/*.cc))) $(sort $(wildcard tests/native/*.cc))
STRESS_FLAGS   := -std=c++17 -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread \
                  -Wall -Wextra -Werror -DLAZYCKPT_FAULT_HOOKS=1 -Icsrc -isystem csrc/third_party/xxhash -MMD -MP
comma := ,

# $(1): name, $(2): argument of -fsanitize
define SANITIZER
$(1)_OBJECTS := $$(STRESS_SOURCES:%.cc=build/$(1)/%.o)

build/$(1)/%.o: %.cc Makefile
	@$$(CHECK_COMPILER)
	@mkdir -p $$(@D)
	$$(CXX) $$(STRESS_FLAGS) -fsanitize=$(2) -c $$< -o $$@

build/$(1)/stress: $$($(1)_OBJECTS)
	$$(CXX) -fsanitize=$(2) -pthread $$^ -ldl -o $$@

build/$(1)/libfake_cuda.so: tests/fake_cuda/fake_cuda.cc tests/fake_cuda/controls.h tests/fake_cuda/streams.h Makefile
	@$$(CHECK_COMPILER)
	@mkdir -p $$(@D)
	$$(CXX) $$(STRESS_FLAGS) -fsanitize=$(2) -fPIC -shared $$< -o $$@

-include $$($(1)_OBJECTS:.o=.d)
endef

$(eval $(call SANITIZER,asan,address$(comma)undefined))
$(eval $(call SANITIZER,tsan,thread))

asan: build/asan/stress build/asan/libfake_cuda.so
	ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 $< $(ARGS)

# The thread sanitizer wants its own parts of the address space: randomisation is switched off where that is allowed.
tsan: build/tsan/stress build/tsan/libfake_cuda.so
	TSAN_OPTIONS=halt_on_error=1 $$(setarch -R true 2>/dev/null && echo setarch -R) $< $(ARGS)
