# `make train` and `make test` do all their set-up themselves: Python >= 3.10, gcc and git are enough.
.PHONY: train test test-all sim cuda-dry-run gpu-check docs lint kernels sanitize pictures setup clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cuh')
TORCH := torch==2.13.0
TORCH_CPU := https://download.pytorch.org/whl/cpu
TORCH_CUDA := torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_STAMP := $(CUDA_VENV)/.installed
ARGS ?=

# Two processes learn real text: make train ARGS="policy=ep name=ep"
train: $(STAMP)
	PYTHON=$(BIN)/python launch/torchrun.sh $(ARGS)

# Tests start a hundred processes: none should compile Hecate again because bytecode is not kept.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

test: $(STAMP)
	$(PYTEST) $(ARGS)

# With the long tail.
test-all: $(STAMP)
	$(PYTEST) -m "long or not long" $(ARGS)

# The simulator against measured steps, in short, and the paper's figure 9; needs root for the emulated cluster.
sim: $(STAMP)
	$(BIN)/python -m benchmarks.validation --short || test $$? -eq 77
	$(BIN)/python -m benchmarks.paper --figures 9 $(ARGS)

# What would break or stall on CUDA, on a device that does not exist: needs torch's CUDA build (6 GB), but no GPU.
cuda-dry-run: $(CUDA_STAMP)
	$(CUDA_VENV)/bin/python -m tests.dry_run $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compile every CUDA kernel for sm_80, sm_90 and sm_100 and print what each takes; needs nvcc, no GPU.
kernels: $(STAMP)
	$(BIN)/python -m hecate.ops.kernels.compile

# The kernels' tests with the native extension under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(STAMP)
	PYTHON=$(BIN)/python launch/sanitize.sh $(ARGS)

# On a GPU: are the kernels right, and how fast are they? ARGS="--device cpu" is a dry run without one.
gpu-check:
	PYTHON=$(PYTHON) launch/gpu_check.sh $(ARGS)

# The docs as a site, in site/: open site/index.html. Broken links and names that do not exist are errors.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mkdocs build --strict $(ARGS)

# Drawings of the docs from their text; needs graphviz.
pictures: docs/flow.svg docs/streams.svg docs/step_time.png

docs/step_time.png: benchmarks/results/end_to_end.json benchmarks/figure.py $(STAMP)
	$(BIN)/python -m benchmarks.figure $< $@

docs/%.svg: docs/%.dot
	dot -Tsvg $< -o $@

setup: $(STAMP)

# Python files need no new installation: it is an editable one. A torch that is there already is kept.
$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHON=$(BIN)/python TORCH="$(TORCH)" TORCH_CPU="$(TORCH_CPU)" launch/install_torch.sh
	$(BIN)/python -m pip install -q "scikit-build-core>=0.10" "nanobind>=2.4" "cmake>=3.18" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[train,hf,dev]"
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[train,hf,dev,docs]"
	touch $(DOCS_STAMP)

$(CUDA_STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q "$(TORCH_CUDA)" "scikit-build-core>=0.10" "nanobind>=2.4" "cmake>=3.18" ninja
	$(CUDA_VENV)/bin/python -m pip install -q --no-build-isolation --config-settings=build-dir=build/cuda -e ".[hf]"
	touch $(CUDA_STAMP)

clean:
	rm -rf build dist site $(STAMP) $(DOCS_STAMP) $(CUDA_STAMP)
