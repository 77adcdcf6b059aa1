# make demo   run the examples, from a fresh clone on
# make test   lint, types and tests, from a fresh clone on; what CI runs
# make quick  the tests that are not marked slow, of every folder, in under two minutes on two cores
# make docs   build the documentation into build/site, strictly, and check that it can be read
# make newest   the suite with the newest torch, transformers and triton: several GB, not in CI
# make release  sdist and wheel, installed and tried in empty environments of every Python that is here
# make lint | types | bench | flashinfer | tensorrt   one part of it; `make format` rewrites files as
#             lint wants them
# make peers  what fp4moe hands to FlashInfer against what vLLM and SGLang do; downloads 400 MB once
# make cubins   what FlashInfer's Blackwell kernels compute, read from their machine code: 458 MB to
#             download and ten minutes; not part of `make test`
#
# PYTHON=python3.12 picks the interpreter of the environment, JOBS=4 the test processes.
# pip keeps its own settings: PIP_FIND_LINKS or PIP_INDEX_URL choose which build of torch comes.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# The tests of FlashInfer's kernels run with both: the version that has its cubins on PyPI, which the
# environment holds, and the current one, which is put before it on the path.
FLASHINFER := 0.7.2.post1
OTHER := build/flashinfer-$(FLASHINFER)

# Torch-TensorRT's Python and the bindings of TensorRT, without the 2 GB of TensorRT itself: enough to
# lower and partition on a CPU. Apart, for it is built for one torch, and only its own tests want it.
TENSORRT := build/torch-tensorrt-2.13.0

# vLLM and SGLang, as wheels, of which only sources are unpacked: their preparation of NVFP4 experts
# runs as it is, what needs a GPU is stood in for. SGLang's wants the newer FlashInfer.
PEERS := build/peers

# The compiled TRT-LLM-Gen kernels, the last that are on PyPI.
CUBINS := build/cubins

.PHONY: demo test quick docs newest release lint format types bench flashinfer tensorrt peers cubins

demo: $(READY)
	$(BIN)/python examples/gemma4_compile.py
	$(BIN)/python examples/nemotron_h_compile.py
	$(BIN)/python examples/own_model.py
	$(BIN)/python examples/quantize_and_reload.py
	$(BIN)/python examples/evaluate_formats.py
	$(BIN)/python examples/lora_finetune.py
	$(BIN)/python examples/two_processes.py
	$(BIN)/python examples/run_notebook.py

# One thread per process: JOBS processes with the threads of a whole machine each are slower. The
# longest tests come last, so that a process that is done takes some of the others'.
test: lint types flashinfer tensorrt
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

quick: $(READY)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest \
		-m "not slow and not gpu" -n $(JOBS) --dist worksteal

flashinfer: $(OTHER)/ready
	PYTHONPATH=$(OTHER) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels/flashinfer

$(OTHER)/ready: $(READY)
	rm -rf $(OTHER)
	$(BIN)/python -m pip install --no-deps --target $(OTHER) flashinfer-python==$(FLASHINFER)
	touch $@

tensorrt: $(TENSORRT)/ready
	PYTHONPATH=$(TENSORRT) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/compile/test_tensorrt.py

$(TENSORRT)/ready: $(READY)
	rm -rf $(TENSORRT)
	$(BIN)/python -m pip install --no-deps --target $(TENSORRT) torch-tensorrt==2.13.0 \
		tensorrt-cu13-bindings==11.0.0.114 dllist==2.0.0 onnx==1.23.2 ml_dtypes==0.6.0 protobuf==7.36.2
	touch $@

peers: $(PEERS)/ready $(OTHER)/ready
	PYTHONPATH=$(PEERS)/packages OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		tests/peers/test_vllm.py tests/peers/test_stand_ins.py
	PYTHONPATH=$(OTHER):$(PEERS)/packages OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/peers

$(PEERS)/ready: $(READY) tests/peers/requirements.txt tests/peers/unpack.py
	rm -rf $(PEERS)/packages $@
	$(BIN)/python -m pip download --no-deps --only-binary :all: --dest $(PEERS)/wheels \
		vllm==0.33.0 sglang==0.5.23
	$(BIN)/python tests/peers/unpack.py $(PEERS)/wheels $(PEERS)/packages
	$(BIN)/python -m pip install --no-deps --target $(PEERS)/packages -r tests/peers/requirements.txt
	touch $@

# The wheel is read as it is; nvdisasm comes with Triton.
cubins: $(CUBINS)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup \
		tests/blackwell/machine_code

$(CUBINS)/ready: $(READY)
	rm -rf $(CUBINS)
	$(BIN)/python -m pip download --no-deps --dest $(CUBINS) flashinfer-cubin==0.6.13
	touch $@

docs: $(VENV)/docs
	$(BIN)/python docs/scripts/readability.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

$(VENV)/docs: $(READY)
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

# An environment of its own, without the constraints. docs/versions.md says when this last passed.
newest:
	test -x build/newest/bin/python || $(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --upgrade torch transformers triton
	build/newest/bin/python -m pip install --upgrade --upgrade-strategy eager -e '.[dev]'
	build/newest/bin/python -m pip list | grep -iE "^(torch|triton|transformers) "
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 build/newest/bin/python -m pytest \
		-n $(JOBS) --dist worksteal

# The wheel is tried with each Python, the sdist with the first of them.
PYTHONS ?= $(shell for v in 3.10 3.11 3.12 3.13 3.14; do python$$v -c '' 2>/dev/null && echo python$$v || true; done)
release: $(READY)
	rm -rf dist build/release
	$(BIN)/python -m build --no-isolation --outdir dist .
	try() { \
		$$1 -m venv build/release/$$2; \
		build/release/$$2/bin/python -m pip install -q -c constraints.txt torch; \
		build/release/$$2/bin/python -m pip install -q -c constraints.txt $$3; \
		(cd build/release && $$2/bin/python ../../.ci/smoke.py); }; \
	mkdir -p build/release; set -- $(PYTHONS); try $$1 sdist dist/*.tar.gz; \
	for python; do try $$python wheel-$$(basename $$python) dist/*.whl; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The copy is laid out as the wheel is; messages are given the paths of the sources again.
types: $(READY)
	rm -rf build/types
	mkdir -p build/types
	cp -pR src/fp4moe build/types/fp4moe
	cp -pR passes build/types/fp4moe/passes
	$(BIN)/mypy | sed -e 's#^build/types/fp4moe/passes/#passes/#' -e 's#^build/types/#src/#'

bench: $(READY)
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file; done

# torch comes first and alone: its pinned version must be in place before anything asks for it.
# fp4moe itself is built without isolation, with the setuptools that was just installed.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
