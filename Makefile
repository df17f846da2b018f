# Duet's commands; `make help` lists them. Everything installed lands in .venv and .venv-protos.

PYTHON ?= python3
LISTEN ?= 127.0.0.1:50051
EXECUTOR ?= 127.0.0.1:50052
HTTP ?= 127.0.0.1:8000
REPLICAS ?= 1
# MODEL: Hugging Face directory to serve; the default model is fetched where it is not given.
# ARGS: further flags of the command behind a target.

VENV := .venv
PY := $(VENV)/bin/python
PROTOS_VENV := .venv-protos
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_BENCH := $(VENV)/.installed-bench
INSTALLED_GATEWAY := $(VENV)/.installed-gateway
INSTALLED_PROTOS := $(PROTOS_VENV)/.installed

PROTOS := $(addprefix protos/duet/,inference/v1/inference.proto executor/v1/executor.proto admin/v1/admin.proto)
PIP_INSTALL := -m pip install --disable-pip-version-check --constraint constraints.txt
# Commands for a recipe: the model's directory in $$model, or the end of the recipe.
FIND_MODEL := model='$(MODEL)'; [ -n "$$model" ] || model=$$($(PY) -m executor_service.weights.default_model) || exit 1
# $(call make_venv,DIRECTORY): an environment with pip in it, unless it is there.
define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo 'Duet needs Python 3.11 or newer: set PYTHON to one.' >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo 'Python cannot make virtual environments: install the package python3-venv.' >&2; exit 1; }
@test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1)
endef
generate_stubs = $(PROTOS_VENV)/bin/python -m grpc_tools.protoc -I . \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)

.DEFAULT_GOAL := help
.PHONY: help run run-gateway run-scheduler run-executor bench test test-gpu test-clients test-sanitizers check fix protos check-protos check-breaking clean

help: ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo '  Variables: MODEL=/path LISTEN=host:port EXECUTOR=host:port HTTP=host:port REPLICAS=2 ARGS="--flag value" PYTHON=python3'

run: $(INSTALLED) ## Set everything up and serve a model until Ctrl-C
	@$(FIND_MODEL); exec $(VENV)/bin/duet serve "$$model" --listen $(LISTEN) --executor-listen $(EXECUTOR) $(ARGS)

run-gateway: $(INSTALLED_GATEWAY) ## Serve OpenAI's HTTP API in front of REPLICAS servers until Ctrl-C
	@$(FIND_MODEL); exec $(VENV)/bin/duet gateway "$$model" --http $(HTTP) --replicas $(REPLICAS) \
		--listen $(LISTEN) --executor-listen $(EXECUTOR) $(ARGS)

run-scheduler: $(INSTALLED) ## Serve with the scheduler service alone
	@$(FIND_MODEL); exec $(PY) -m scheduler_service --model "$$model" --listen $(LISTEN) --executor $(EXECUTOR) $(ARGS)

run-executor: $(INSTALLED) ## Compute with the executor service alone
	@$(FIND_MODEL); exec $(PY) -m executor_service --model "$$model" --listen $(EXECUTOR) $(ARGS)

bench: $(INSTALLED_BENCH) ## Measure beside other engines and store the figures
	@$(FIND_MODEL); exec $(PY) -m benchmarks --model "$$model" $(ARGS)

test: $(INSTALLED_DEV) ## Run every test that needs no GPU
	$(PY) -m pytest $(ARGS)

test-gpu: $(INSTALLED_DEV) ## Run what a GPU shows: kernels, golden tokens, graphs, executor loss
	$(PY) -m pytest tests/kernels/gpu tests/gpu tests/golden tests/faults $(ARGS)

# What the clients are built with in a Debian 12, and the packages that hold it.
CLIENT_TOOLS := node npm go protoc protoc-gen-go protoc-gen-go-grpc g++ pkg-config grpc_cpp_plugin javac grpc_java_plugin
CLIENT_FILES := /usr/include/grpcpp/grpcpp.h $(addprefix /usr/share/gocode/src/google.golang.org/,genproto grpc) \
	$(patsubst %,/usr/share/java/%.jar,grpc-netty guava netty-codec-http2 perfmark-api proto-google-common-protos \
	protobuf geronimo-annotation-1.3-spec)
CLIENT_PACKAGES := nodejs npm golang-go golang-google-grpc-dev golang-google-genproto-dev \
	golang-github-golang-protobuf-1-5-dev protobuf-compiler protoc-gen-go protoc-gen-go-grpc g++ pkg-config \
	libgrpc++-dev libprotobuf-dev protobuf-compiler-grpc default-jdk-headless libgrpc-java libprotobuf-java \
	libgoogle-common-protos-java libguava-java libnetty-java libperfmark-java libgeronimo-annotation-1.3-spec-java \
	protobuf-compiler-grpc-java-plugin

test-clients: $(INSTALLED_DEV) ## Build the clients in all languages and run them against the services
	@missing=; \
	for tool in $(CLIENT_TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	for file in $(CLIENT_FILES); do test -e $$file || missing="$$missing $$file"; done; \
	if [ -n "$$missing" ]; then \
		echo "Missing:$$missing" >&2; echo 'Install them: apt-get install $(CLIENT_PACKAGES)' >&2; exit 1; fi
	$(PY) -m pytest tests/clients -m '' $(ARGS)

test-sanitizers: $(INSTALLED_DEV) ## Run the library in C under the address, undefined-behaviour and thread sanitizers
	$(PY) -m tests.kernels.cpu.sanitize

check: $(INSTALLED_DEV) check-protos check-breaking ## Check style, types, import rules, protocols, stubs; count lines
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/buf lint
	$(PY) -m tools.readme --check
	$(PY) -m tools.reliability --check
	$(PY) -m tools.api_reference --check
	$(PY) tools/line_count.py

fix: $(INSTALLED_DEV) ## Mend what ruff can mend
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

protos: $(INSTALLED_PROTOS) ## Generate the Python stubs anew
	$(call generate_stubs,.)

check-protos: $(INSTALLED_PROTOS) ## Fail where the committed stubs differ from the protocols
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call generate_stubs,"$$fresh") && \
	diff -rq --exclude='*.proto' --exclude=__init__.py --exclude=__pycache__ "$$fresh/protos" protos || \
	{ echo 'The stubs are not those of the protocols: run "make protos".' >&2; exit 1; }

check-breaking: $(INSTALLED_DEV) ## Fail where the protocols break those of origin/main
	@if ! git rev-parse --verify -q origin/main:protos >/dev/null; then echo 'No protocols at origin/main to compare with.'; \
	else $(VENV)/bin/buf breaking --against '.git#ref=origin/main'; fi

clean: ## Remove the environments and all caches
	rm -rf clients/*/build clients/node/node_modules
	rm -rf $(VENV) $(PROTOS_VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(PY) $(PIP_INSTALL) --editable '.[scheduler,executor,model]'
	$(PY) -m kernels.cpu.build
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(PY) $(PIP_INSTALL) --editable '.[scheduler,executor,model,dev]'
	$(PY) -m kernels.cpu.build
	@touch $@ $(INSTALLED)

$(INSTALLED_GATEWAY): $(INSTALLED)
	$(PY) $(PIP_INSTALL) --editable '.[scheduler,executor,model,gateway]' smg
	@touch $@

# xllamacpp is llama.cpp, one of the engines to measure beside.
$(INSTALLED_BENCH): $(INSTALLED_DEV)
	$(PY) $(PIP_INSTALL) xllamacpp
	@touch $@

$(INSTALLED_PROTOS): constraints.txt
	$(call make_venv,$(PROTOS_VENV))
	$(PROTOS_VENV)/bin/python -m pip install --disable-pip-version-check "$$(grep '^grpcio-tools==' constraints.txt)"
	@touch $@
