# Every target makes and uses the virtual environment in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   ?= build/demo-model

.PHONY: setup system images-system images-sizes criu demo docs docs-pictures test test-heavy test-vllm test-dynamo test-images lint format bench bench-peers bench-vllm gpu gpu-wheels clean

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

# What the tests run beside Python: nginx serves ranges, curl asks, Chromium shows the page, iproute2 makes hosts and
# links of a rate, g++ compiles decode steps (for images, too). Only what is missing, and only as root.
system:
	@missing=""; \
	command -v nginx >/dev/null || test -x /usr/sbin/nginx || missing="nginx-light"; \
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || missing="$$missing chromium chromium-driver"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	command -v ip >/dev/null && command -v tc >/dev/null || missing="$$missing iproute2"; \
	command -v curl >/dev/null || missing="$$missing curl"; \
	test -z "$$missing" || (apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing)

# CRIU freezes and restores workers. Into build/criu where this system has none that is new enough.
criu: build/criu/bin/criu

build/criu/bin/criu:
	snapshot/install-criu.sh build/criu

# In as many processes as there are cores, up to four; WORKERS=0 is one after the other, in this one.
WORKERS ?= auto
SEVERAL = -n $(WORKERS) --dist worksteal

test: setup
	$(BIN)/python -m pytest $(SEVERAL)

# What takes long: everything that can go wrong with a snapshot, and the benchmarks' own tests.
test-heavy: setup
	$(BIN)/python -m pytest -m heavy $(SEVERAL)

# The image for a CPU, built from its Dockerfile without an engine and run as platforms run it: as root. What was
# built is kept in build/images.
test-images: setup images-system
	$(BIN)/python -m pytest -m images tests/images tests/benchmarks/test_image_bench.py

# buildah carries Dockerfiles out, mmdebstrap makes what they begin with, runc runs what comes of it; with buildah comes
# the seccomp profile that CRI-O has.
images-system:
	@missing=""; \
	for program in buildah runc mmdebstrap; do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	test -e /usr/share/containers/seccomp.json || missing="$$missing golang-github-containers-common"; \
	test -z "$$missing" || (apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing)

# What torch and vLLM ask for today, into the images' lists, and what their wheels hold, of which no whole one is
# fetched: that takes a newer pip than Python comes with.
images-sizes:
	$(PYTHON) -m venv build/pip
	build/pip/bin/python -m pip install --quiet 'pip>=26' packaging
	build/pip/bin/python images/pins.py
	build/pip/bin/python images/wheel_sizes.py cuda
	build/pip/bin/python images/wheel_sizes.py vllm

# With the real vLLM, in its environment: what it says on the way is not ours to mend.
test-vllm: setup build/vllm/.tests
	build/vllm/bin/python -m pytest -m vllm -o filterwarnings=default tests/runtime/integrations/vllm \
		tests/benchmarks/test_vllm_benchmarks.py

build/vllm/.tests: build/vllm/.ready pyproject.toml constraints.txt Makefile
	build/vllm/bin/python -m pip install --quiet --no-deps -e .
	build/vllm/bin/python -m pip install --quiet -c constraints.txt lz4 xxhash boto3 awscrt \
	  pytest pytest-timeout hypothesis "moto[server]" trustme
	touch $@

# With NVIDIA Dynamo, in its environment: it wants another pydantic than ours has. Where it has nothing of its own
# there, torch for one, it finds what is in .venv.
test-dynamo: build/dynamo/.tests
	build/dynamo/bin/python -m pytest -m dynamo tests/runtime/integrations/dynamo tests/benchmarks/test_dynamo_benchmark.py

build/dynamo/.tests: build/dynamo/.ready $(VENV)/.ready pyproject.toml Makefile
	build/dynamo/bin/python -m pip install --quiet --no-deps -e .
	build/dynamo/bin/python -c "import sysconfig as s, subprocess as p; ours = s.get_path('purelib'); \
	  theirs = p.check_output(['$(BIN)/python', '-c', 'import sysconfig as s; print(s.get_path(\"purelib\"))'], text=True).strip(); \
	  open(ours + '/zz-beside.pth', 'w').write(f'import site; site.addsitedir({theirs!r})\n')"
	touch $@

build/dynamo/.ready: benchmarks/install-dynamo.sh
	PYTHON=$(PYTHON) benchmarks/install-dynamo.sh build/dynamo
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
	$(BIN)/shellcheck .ci/run */*.sh

# The site, in build/docs: with all warnings errors, and without a network.
docs: setup
	$(BIN)/python -m sphinx -q -E -a -W --keep-going docs build/docs

# The pictures in it, of starts on this machine; of vLLM where `make bench-vllm` has been made.
docs-pictures: setup
	$(BIN)/coldframe demo-model $(DEMO) --size base
	$(BIN)/coldframe bench cold $(DEMO) --beside transformers,fastapi,vllm,vllm-compiled-kept \
		$(if $(wildcard build/vllm/bin/python),--vllm-python build/vllm/bin/python) --output build/cold.json
	$(BIN)/python docs/pictures.py build/cold.json

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
