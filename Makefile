# Everything runs in .venv, which the first target that needs it makes. `make gpu` alone takes the system's Python.

PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
GPU_PYTHON ?= python3
GPU_ARGS ?=
OUT ?= outputs/gpu
PYTEST_ARGS ?=
PYTEST_JOBS ?= 2
# Two builds run beside one another: each as many compilers as there are cores.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Many tests start Python: from compiled files, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
# A process for each job, with one thread each where a test does not ask for more. Each begins with a share of its
# own, so that what a module prepares is prepared once, and takes from the other's when it is done.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(PYTEST_JOBS) --dist worksteal -p no:benchmark
VENV := .venv/.ready
NATIVE := build/native.stamp
CHECKED := build/native-werror.stamp
SANITIZED := build/sanitize
CORE := CMakeLists.txt $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.def' \) 2>/dev/null)
CPP_FILES = $(shell git ls-files '*.cpp' '*.h' '*.c' '*.cu' '*.cuh' 2>/dev/null)

.DELETE_ON_ERROR:
.PHONY: help setup demo test nightly pytest bench gpu docs lint format sanitize sanitized aarch64 wheel unchecked clean

help:
	@echo "make setup      .venv with the package in it"
	@echo "make demo       learn, prune, finetune, pack and time a network: outputs/demo"
	@echo "make test       lint, native build with warnings as errors, sanitized native tests, pytest"
	@echo "make nightly    what takes long: the other tests, examples, long fuzzing"
	@echo "make bench      benchmarks on this CPU: outputs/bench"
	@echo "make gpu OUT=d  nine minutes on a GPU, with the system's Python: results under d"
	@echo "make wheel      a manylinux wheel, installed into an empty environment and tried: dist"
	@echo "make docs       the docstrings as HTML: outputs/docs"
	@echo "make lint, format, sanitize, clean"

setup: $(NATIVE)

# The pins come first: the package's own requirements would otherwise fetch the newest torch there is.
$(VENV): requirements/dev.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dsp-kernels needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) -V 2>&1`. Name another: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	DSP_KERNELS_NATIVE=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# In place, beside the Python files. A machine without a compiler gets the reference backend and a word about it.
$(NATIVE): $(VENV) $(CORE)
	@mkdir -p build
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The same module with warnings as errors; `make demo` after `make test` keeps it.
$(CHECKED): $(VENV) $(CORE)
	@mkdir -p build
	DSP_KERNELS_NATIVE=1 DSP_KERNELS_CMAKE_ARGS="$(DSP_KERNELS_CMAKE_ARGS) -DDSP_WERROR=ON" \
		$(BIN)/python setup.py --quiet build_ext --inplace
	touch $(NATIVE) $@

demo: $(NATIVE)
	$(BIN)/dsprune demo --out outputs/demo

# What users call; the rest is for those who read the code.
DOCUMENTED := dsprune dsprune.export dsprune.integrations \
	dsp_kernels dsp_kernels.layout dsp_kernels.program dsp_kernels.conv dsp_kernels.assignment
docs: $(VENV)
	$(BIN)/python -W error -m pdoc --docformat google --output-directory outputs/docs $(DOCUMENTED)

bench: $(NATIVE)
	$(BIN)/python -m bench --out outputs/bench

# Linters take one core, compilers the other; then the tests, one kind after the other.
test:
	$(MAKE) -j 3 lint $(CHECKED) sanitized
	$(MAKE) sanitize
	$(MAKE) pytest
	$(MAKE) unchecked

# Tests that measure times to find something want the machine alone. Whether Triton interprets or compiles is settled
# at import, so its interpreter has a run of its own.
pytest: $(CHECKED)
	$(PYTEST) -m "not alone and not nightly" $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(PYTEST) -n 0 -m "alone and not nightly")
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter

# What is too long for every change. Seconds of fuzzing for each of the two programs.
NIGHTLY_FUZZ_SECONDS ?= 900
nightly: $(CHECKED) sanitized
	$(PYTEST) -m "nightly and not alone"
	$(PYTEST) -n 0 -m "nightly and alone"
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -m "nightly or not nightly"
	$(if $(shell command -v qemu-aarch64-static && command -v aarch64-linux-gnu-g++),$(MAKE) aarch64,@echo \
		"aarch64: left out, no qemu-aarch64-static or no aarch64-linux-gnu-g++")
	$(MAKE) wheel
	$(SANITIZED)/tests/native/dsp_fuzz --seconds $(NIGHTLY_FUZZ_SECONDS) --seed $$(date +%j)
	$(SANITIZED)/tests/native/dsp_fuzz_lasso --seconds $(NIGHTLY_FUZZ_SECONDS) --seed $$(date +%j)
	ASAN_OPTIONS=allocator_may_return_null=1 $(SANITIZED)/tests/native/dsp_fuzz_file --seconds 60 \
		--seed $$(date +%j)

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run -Werror $(CPP_FILES))

format: $(VENV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))

# What this machine could not check: tests are skipped then, and that is easily overlooked.
unchecked: $(CHECKED)
	@$(BIN)/python tests/unchecked.py

# The core and its own tests under AddressSanitizer and UBSan; no Python in it.
sanitized: $(VENV)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DDSP_SANITIZE=ON -DDSP_WERROR=ON -DDSP_PYTHON=OFF
	$(BIN)/cmake --build $(SANITIZED)

# The core, the runtime and the C examples for aarch64, run by an emulator: Debian's g++-aarch64-linux-gnu and
# qemu-user-static.
AARCH64 := build/aarch64
aarch64: $(VENV)
	$(BIN)/cmake -S . -B $(AARCH64) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DDSP_TESTS=ON -DDSP_WERROR=ON \
		-DDSP_PYTHON=OFF -DDSP_CUDA=OFF -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/tests/native/aarch64.cmake
	$(BIN)/cmake --build $(AARCH64)
	$(BIN)/ctest --test-dir $(AARCH64) -j $(PYTEST_JOBS) --output-on-failure --no-tests=error

# Wheels of the Pythons on PATH, or of those in WHEEL_PYTHONS. A tag says from which C library on it runs: that of the
# machine that builds it. WHEEL_TORCH=1 tries them with torch and all other requirements, too.
wheel: $(CHECKED)
	$(BIN)/python tests/try_wheel.py --out dist $(if $(WHEEL_TORCH),--torch) $(addprefix --python ,$(WHEEL_PYTHONS))

sanitize: sanitized
	$(BIN)/ctest --test-dir $(SANITIZED) -j $(PYTEST_JOBS) --output-on-failure --no-tests=error

# One command that runs on a machine without make as well: GPU_ARGS=--tune and GPU_ARGS=--others are further calls.
gpu:
	@$(GPU_PYTHON) bench/device_run.py --out "$(OUT)" $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info python/*.egg-info outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf dsp_kernels/_native*.so dsp_kernels/_build_info.json dsp_kernels/include dsp_kernels/lib
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	rm -f $(VENV)
