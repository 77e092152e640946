# Everything to build, try and check this project. `make` lists the targets.
#
# All of them set up what they need: .venv with the package (editable), its extras and its tools. PYTHON=… picks an
# interpreter; without it the first of the names below that is new enough is taken.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON_CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TEST_PROCESSES ?= 3
SOAK_SECONDS ?= 600
FUZZ_RUNS ?= 20000000
FUZZ_BUILD := build/fuzz/.built
STORM_SECONDS ?= 1800
KILLS ?= 200
MOVES_ROUNDS ?= 3
VERSION := $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' topk_grpc/_version.py)
IMAGE ?= ghcr.io/topk-grpc/topk-grpc
CHECKOV := build/checkov/.built

# What an install depends on: an edited kernel or proto is built again.
SOURCES := pyproject.toml setup.py MANIFEST.in $(shell find protos -name '*.proto') $(wildcard topk_grpc/kernels/*.py)

.PHONY: help install demo test soak fuzz fuzz-build lint bench docs audit-dependencies clean storm kills moves \
	image test-image checkov lock

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Make .venv with the package, its extras and its tools

demo: $(STAMP) ## Show the whole story in a minute: a cluster, a stream, a kill -9, every count checked
	@$(BIN)/topk demo

test: $(STAMP) ## Run the tests (PYTEST=… adds arguments)
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST)

soak: $(STAMP) ## Compare windows of clusters under random traffic and kills with an oracle (SOAK_SECONDS=600 SEED=…)
	@TOPK_SOAK_SECONDS=$(SOAK_SECONDS) $(if $(SEED),TOPK_SOAK_SEED=$(SEED)) $(BIN)/python -m pytest -s \
		tests/cluster/test_windows.py tests/cli/test_windows_somafm.py $(PYTEST)

fuzz: $(FUZZ_BUILD) ## Fuzz kernels and readers under sanitizers; goes on where it stopped (FUZZ_RUNS=20000000 FUZZ="--target wire …")
	@$(BIN)/python -m tests.fuzz.run --runs $(FUZZ_RUNS) $(FUZZ)

fuzz-build: $(FUZZ_BUILD) ## Compile the kernels for fuzzing, beside the usual ones (needs clang; CLANG=clang-16)

storm: $(STAMP) ## Break processes, networks and disks under load and check every count (STORM_SECONDS=1800 SEED=… STORM=…)
	@$(BIN)/python -m tests.faults --seconds $(STORM_SECONDS) $(if $(SEED),--seed $(SEED)) $(STORM)

kills: $(STAMP) ## The same with kill -9 of random processes alone (KILLS=200 SEED=… STORM=…)
	@$(BIN)/python -m tests.faults --kills $(KILLS) $(if $(SEED),--seed $(SEED)) $(STORM)

moves: $(STAMP) ## Grow a cluster from 2 to 4 shards and drain it again, under load, and check every count (MOVES_ROUNDS=3 SEED=…)
	@TOPK_MOVES_ROUNDS=$(MOVES_ROUNDS) $(if $(SEED),TOPK_MOVES_SEED=$(SEED)) $(BIN)/python -m pytest -s \
		tests/cluster/test_elastic_load.py $(PYTEST)

lint: $(STAMP) ## Check style, types, import contracts and protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint

bench: $(STAMP) ## Measure throughput, latency and memory, beside a bare relay and Redis
	@$(BIN)/python -m benchmarks

docs: $(STAMP) ## Write docs/settings.md anew
	@$(BIN)/python -m topk_grpc.cli.settings > docs/settings.md

image: ## Build the image, tagged X.Y.Z and X.Y (IMAGE=… names it, IMAGE_OPTIONS=… adds to the builder's)
	@builder=$$(command -v buildah podman docker | head -1); \
	if [ -z "$$builder" ]; then echo "error: none of buildah, podman and docker is here" >&2; exit 1; fi; \
	"$$builder" build -f deploy/Dockerfile $(IMAGE_OPTIONS) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD)$$(git diff --quiet HEAD || echo -dirty) \
		-t $(IMAGE):$(VERSION) -t $(IMAGE):$(basename $(VERSION)) .

test-image: $(STAMP) ## Build the image without a registry, and run both overlays' containers with podman (root, Debian)
	@TOPK_TEST_IMAGE=1 $(BIN)/python -m pytest -s tests/image $(PYTEST)

checkov: $(STAMP) $(CHECKOV) ## Check image, manifests and their settings, hardening included (installs checkov)
	@$(BIN)/python -m pytest tests/deploy $(PYTEST)

lock: $(STAMP) ## Pin anew what the image installs: deploy/*.lock, with hashes
	@$(PIP) install uv
	@$(BIN)/python .ci/lock.py

audit-dependencies: $(STAMP) ## Ask PyPI's vulnerability database about every installed package (needs the network)
	@if $(BIN)/python .ci/audit_reachable.py; then \
		$(PIP) install pip-audit && $(BIN)/pip-audit --skip-editable --progress-spinner off; \
	else \
		echo "not audited: the vulnerability database cannot be reached from here"; \
	fi

clean: ## Remove .venv and everything that was built or generated
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f topk_grpc/kernels/*.so topk_grpc/kernels/*.c topk_grpc/kernels/_build_info.json
	rm -f topk_grpc/pb/topk/v1/*_pb2*
	find topk_grpc tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The compiler is probed, so that there are two ways and no third: where C extensions can be built, a kernel that does
# not compile is an error; where they cannot, the kernels are installed as they are, and that is said.
$(STAMP): $(SOURCES)
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
		python=; \
		for each in $(or $(PYTHON),$(PYTHON_CANDIDATES)); do \
			if $$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$each; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "error: Python 3.11 or newer is needed, and none of these is: $(or $(PYTHON),$(PYTHON_CANDIDATES))." \
				"Install one, or name it: make install PYTHON=/path/to/python3" >&2; exit 1; \
		fi; \
		echo "Making .venv with $$($$python --version); this takes a minute or two the first time"; \
		$$python -m venv .venv || { rm -rf .venv; echo "error: $$python cannot make a virtual environment (Debian:" \
			"apt-get install python3-venv)" >&2; exit 1; }; \
	fi; \
	$(PIP) install --upgrade pip 'setuptools>=77'; \
	if [ -n "$${TOPK_NO_COMPILE:-}" ] && [ "$$TOPK_NO_COMPILE" != 0 ]; then \
		echo "TOPK_NO_COMPILE is set: installing the kernels uncompiled, exact but hundreds of times slower"; \
	elif reason=$$($(BIN)/python .ci/probe_compiler.py); then \
		echo "Compiling the kernels"; \
	else \
		export TOPK_NO_COMPILE=1; \
		echo "No C extension can be built here ($$reason): installing the kernels uncompiled," \
			"exact but hundreds of times slower. Install gcc and Python's headers, then: make clean install"; \
	fi; \
	$(PIP) install --editable '.[dev,deploy,ingest,etcd,tracing]'; \
	$(BIN)/topk --version; \
	touch $@

# It pins what others need newer, so it lives apart.
$(CHECKOV): | $(STAMP)
	@rm -rf build/checkov; $(BIN)/python -m venv build/checkov
	@build/checkov/bin/python -m pip --disable-pip-version-check --quiet install 'checkov>=3.2'
	@touch $@

# A build of its own: the installed kernels stay as they are.
$(FUZZ_BUILD): $(wildcard topk_grpc/kernels/*.py) setup.py | $(STAMP)
	@clang=$${CLANG:-$$(compgen -c clang- | grep -xE 'clang-[0-9]+' | sort -rV | head -1)}; clang=$${clang:-clang}; \
	command -v $$clang >/dev/null || { echo "error: $$clang is missing: install clang and its runtime (Debian:" \
		"apt-get install clang-16 libclang-rt-16-dev), or name another: make fuzz CLANG=/path/to/clang" >&2; exit 1; }; \
	set -e -o pipefail; $(PIP) install 'atheris>=3.0'; \
	echo "Compiling the kernels with $$clang, sanitizers and coverage; this takes a minute or two"; \
	CLANG=$$clang TOPK_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/fuzz/lib \
		--build-temp build/fuzz/objects 2>&1 | { grep -vE 'performance hint|Use boundscheck' || true; }; \
	touch $@
