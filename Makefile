# What a person does in this repository; .ci/run and .github/workflows/ci.yml call the same targets.
# Everything runs from a virtual environment that the first target to need it makes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PORT ?= 8000
MODEL ?=
ARGS ?=
# Requests that fuzz makes to each address, as many valid as invalid ones.
EXAMPLES ?= 200
# Processes that share the tests, those marked `alone` excepted.
WORKERS ?= 2
PYTHON ?=
# An extra package index to take torch from, such as https://download.pytorch.org/whl/cpu (see README.md).
TORCH_INDEX ?=
# For the containers: a prepared store, the folder of keys, further arguments for docker build, and Compose itself.
STORE ?=
KEYS ?= $(or $(XDG_CONFIG_HOME),$(HOME)/.config)/odmoe/keys
IMAGE_ARGS ?=
COMPOSE ?= $(shell docker compose version > /dev/null 2>&1 && echo docker compose || echo docker-compose)

READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: help
help: ## show this list
	@echo "usage: make TARGET [NAME=value ...]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo; echo "  PORT=8000       port of serve and chat"
	@echo "  MODEL=          a prepared store, a checkpoint folder or a hub name, for serve (default: the built-in model)"
	@echo "  ARGS=           further arguments for serve, chat, test and quick; for bench in place of --quick"
	@echo "  WORKERS=2       processes that share the tests of test and quick"
	@echo "  EXAMPLES=200    requests of each kind that fuzz sends to each address"
	@echo "  STORE= KEYS=    prepared store and folder of keys, for up (default: the built-in model; made when missing)"
	@echo "  IMAGE_ARGS=     further arguments of docker build, for image and up"
	@echo "  PYTHON=         Python to make the environment with, for setup (default: the first of 3.11, 3.12, 3.13)"
	@echo "  TORCH_INDEX=    extra package index for torch, for setup"

.PHONY: setup
setup: $(READY) ## make the virtual environment (the others do it when needed)
	@:

# The file comes last and goes first, so an interrupted installation never looks complete: it starts anew.
$(READY): pyproject.toml constraints.txt
	@if [ -e $(READY) ]; then rm $(READY); else rm -rf $(VENV); fi
	@python=; for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi
	done
	[ -n "$$python" ] || { echo "odmoe needs Python 3.11 or newer; none was found (make setup PYTHON=/path/to/python)" >&2; exit 1; }
	echo "setting up $(VENV) with $$python: a few minutes the first time"
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	quiet=-qq; if [ -t 1 ]; then quiet=; fi  # who looks on sees it go on
	$(BIN)/python -m pip --disable-pip-version-check install $$quiet -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[server,bench,dev,fuzz,otel]'
	touch $(READY)

.PHONY: serve
serve: $(READY) ## serve the default model here, all roles on this machine (PORT= MODEL= ARGS=)
	@exec $(BIN)/odmoe serve $(if $(MODEL),--model $(MODEL)) --port $(PORT) $(ARGS)

.PHONY: chat
chat: $(READY) ## talk to a running server in the terminal (PORT= ARGS=)
	@exec $(BIN)/odmoe chat --url http://127.0.0.1:$(PORT) $(ARGS)

.PHONY: test
test: $(READY) ## the whole test suite; with ARGS=, what they name, one after the other
	@export OMP_NUM_THREADS=1
	if [ -n "$(strip $(ARGS))" ]; then exec $(BIN)/python -m pytest -q $(ARGS); fi
	$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest -q -m "slow and not alone" -n $(WORKERS) --dist worksteal
	exec $(BIN)/python -m pytest -q -m alone

.PHONY: quick
quick: $(READY) ## the tests that start no real processes and no default model (ARGS=)
	@exec env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: fuzz
fuzz: $(READY) ## send every role what nobody should, over its links and over HTTP, for some minutes (EXAMPLES=)
	@env OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz.wire
	exec env OMP_NUM_THREADS=1 ODMOE_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q tests/fuzz $(ARGS)

.PHONY: chaos
chaos: $(READY) ## kill, pause, restart and cut off every role under load, and count what it costs (ARGS=)
	@exec env OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m chaos $(ARGS)

.PHONY: bench
bench: $(READY) ## measure decoding and forecasts; records go to tests/bench/results (ARGS=--no-quick)
	@$(BIN)/odmoe bench decode $(or $(ARGS),--quick)
	$(BIN)/odmoe bench recall $(or $(ARGS),--quick)

.PHONY: check
check: $(READY) ## lint, format, types and import arrows; changes nothing
	@failed=0
	for tool in "ruff check --quiet" "ruff format --check --quiet" mypy "lint-imports --no-logo"; do
		echo "== $$tool"; $(BIN)/$$tool || failed=1
	done
	exit $$failed

.PHONY: format
format: $(READY) ## sort imports, mend what ruff can mend, format
	@$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: image
image: ## build the container images odmoe-node, odmoe-predictor and odmoe-server (IMAGE_ARGS=)
	@for role in node predictor server; do
		echo "building odmoe-$$role:local"; docker build -q --target $$role $(IMAGE_ARGS) -t odmoe-$$role:local . > /dev/null
	done

# Docker's root would leave keys that the services, which are not root, cannot read.
.PHONY: up
up: $(READY) image ## start the ten containers of docker-compose.yml (STORE= KEYS= PORT= IMAGE_ARGS=)
	@store="$(STORE)"; [ -n "$$store" ] || store=$$($(BIN)/odmoe prepare --builtin default)
	$(BIN)/odmoe keys "$(KEYS)" --nodes 8 > /dev/null
	uid=$$(id -u) gid=$$(id -g)
	if [ $$uid = 0 ]; then uid=10001 gid=10001; chown -R $$uid:$$gid "$(KEYS)"; fi
	export ODMOE_STORE="$$store" ODMOE_KEYS="$(KEYS)" ODMOE_PORT=$(PORT) ODMOE_UID=$$uid ODMOE_GID=$$gid
	$(COMPOSE) up -d
	for _ in $$(seq 120); do
		if curl -fsS -m 2 http://127.0.0.1:$(PORT)/health > /dev/null 2>&1; then
			echo "ready: http://127.0.0.1:$(PORT)/v1 (make down ends it)"; exit 0
		fi
		sleep 1
	done
	echo "not ready after two minutes; see: docker ps -a, docker logs" >&2; exit 1

.PHONY: test-containers
test-containers: $(READY) ## build the images, start the ten containers, ask them, hurt them, take them down (ARGS=)
	@exec env OMP_NUM_THREADS=1 ODMOE_TEST_CONTAINERS=1 $(BIN)/python -m pytest -q -rs tests/containers $(ARGS)

.PHONY: down
down: ## stop and remove the ten containers
	@ODMOE_STORE=/none ODMOE_KEYS=/none $(COMPOSE) down

.PHONY: clean
clean: ## remove the virtual environment and every cache in this folder (prepared models stay)
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
