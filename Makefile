# Every target makes and uses the virtual environment in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   ?= build/demo-model

.PHONY: setup system criu demo test test-heavy test-vllm lint format bench bench-peers bench-vllm gpu gpu-wheels clean

setup: $(VENV)/.ready

# pykustomize is kustomize as a library; that it wants Python 3.14 is said by its packaging alone.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python -c constraints.txt pykustomize
	touch $@

PROMPT = -p "Once upon a time, a replica slept at zero, and then a request" -n 48

# From a slow link, then from the page cache, fresh and with a clone. Without CRIU the last is fresh too.
demo: setup
	$(BIN)/coldframe demo-model $(DEMO) --size base
	$(BIN)/coldframe run $(DEMO) --snapshot off --throttle 200MB/s $(PROMPT)
	@test -x build/criu/bin/criu || snapshot/install-criu.sh build/criu || true
	$(BIN)/coldframe run $(DEMO) --snapshot build/snapshots --quiet $(PROMPT)
	$(BIN)/coldframe run $(DEMO) --snapshot build/snapshots $(PROMPT)

# What the tests run beside Python: nginx serves ranges, Chromium shows the page, g++ compiles decode steps (for
# images, too). Only what is missing, and only as root.
system:
	@missing=""; \
	command -v nginx >/dev/null || test -x /usr/sbin/nginx || missing="nginx-light"; \
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || missing="$$missing chromium chromium-driver"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	test -z "$$missing" || (apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing)

# CRIU freezes and restores workers. Into build/criu where this system has none that is new enough.
criu: build/criu/bin/criu

build/criu/bin/criu:
	snapshot/install-criu.sh build/criu

test: setup
	$(BIN)/python -m pytest

# What takes long: everything that can go wrong with a snapshot, and the benchmarks' own tests.
test-heavy: setup
	$(BIN)/python -m pytest -m heavy

# With the real vLLM, in its environment: what it says on the way is not ours to mend.
test-vllm: setup build/vllm/.tests
	build/vllm/bin/python -m pytest -m vllm -o filterwarnings=default tests/runtime/integrations/vllm \
		tests/benchmarks/test_vllm_benchmarks.py

build/vllm/.tests: build/vllm/.ready pyproject.toml constraints.txt Makefile
	build/vllm/bin/python -m pip install --quiet --no-deps -e .
	build/vllm/bin/python -m pip install --quiet -c constraints.txt lz4 xxhash boto3 awscrt \
	  pytest pytest-timeout hypothesis "moto[server]" trustme
	touch $@

# mypy sees the repository as the package it is installed as.
build/types/coldframe:
	mkdir -p build/types
	ln -s ../.. $@

lint: setup build/types/coldframe
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/coldframe demo-model $(DEMO) --size base
	$(BIN)/coldframe bench spine $(DEMO)

# Other loaders, in an environment of their own: coldframe bench load ... --peer-python build/peers/bin/python
bench-peers: setup
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet -c constraints.txt torch numpy safetensors runai-model-streamer runai-model-streamer-s3 fastsafetensors

# vLLM's own server, beside ours: coldframe bench endpoint ... --vllm-python build/vllm/bin/python
bench-vllm: build/vllm/.ready

build/vllm/.ready: benchmarks/install-vllm.sh
	PYTHON=$(PYTHON) benchmarks/install-vllm.sh build/vllm
	touch $@

# All that a machine with an NVIDIA GPU can tell, in less than 560 s: benchmarks/results, docs/gpu.md.
# It takes PYTHON as it is, with torch, safetensors, transformers, cuda-bindings and pytest in it, and
# makes no virtual environment. ARGS are those of `coldframe bench gpu`, as in make gpu ARGS=--log
gpu: build/types/coldframe
	@set -e; site=build/gpu-site; rm -rf $$site; mkdir -p $$site; \
	for wheel in build/gpu-wheels/*.whl; do test ! -f "$$wheel" || $(GPU_PYTHON) -m zipfile -e "$$wheel" $$site; done; \
	PYTHONPATH=$(CURDIR)/build/types:$(CURDIR)/$$site$${PYTHONPATH:+:$$PYTHONPATH} \
		$(GPU_PYTHON) -P -m coldframe.benchmarks.gpu $(ARGS)

GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# Pure-Python packages for such a machine that has no network: made here, carried there in build/gpu-wheels.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --platform any \
		-r benchmarks/gpu/wheels.txt -d build/gpu-wheels

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
