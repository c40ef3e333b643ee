# Everything from a fresh clone: `make demo`, `make test`. Needs Python 3.11 or later and make.
# Where packages come from is pip's own business: set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL,
# for one to choose a torch without CUDA.

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up
NATIVE := kvrelay/native/_native.so
MODEL := smollm2-135m-instruct
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python3.13 python3.14 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
PYTEST := $(BIN)/python -m pytest -q
GPU := $(or $(GPU_PYTHON),$(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: bench-kv-dtypes bench-control bench-peers bench-transfer gpu help setup pull demo test test-fast check protos proto-check fmt fmt-check lint type imports chaos fuzz-handoff clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

setup: $(SETUP) $(NATIVE) ## Make .venv with everything in it

$(SETUP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later on PATH" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing kvrelay and what it needs into $(VENV) (about 2.4 GB with CPU torch; minutes on a slow line)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The installation builds it too. Here it is built again when its sources have changed; where that
# cannot be done, the reason is told, and torch computes.
$(NATIVE): kvrelay/native/build.py $(wildcard kvrelay/native/src/*)
	@"$(PYTHON)" kvrelay/native/build.py || echo "the CPU engine is not compiled: torch computes instead, several times slower"

pull: $(SETUP) $(NATIVE) ## Fetch the model of the demo and the tests
	$(BIN)/kvrelay pull $(MODEL)

demo: pull ## Start the three services, answer one question, show where the time went
	$(BIN)/kvrelay demo --model $(MODEL)

test: pull ## All tests that need no GPU
	tests/run.sh $(PYTEST)

test-fast: $(SETUP) $(NATIVE) ## The tests that start no processes
	$(PYTEST) tests/unit tests/contract -m 'not e2e and not realmodel'

chaos: pull ## Only the tests that kill, stop or starve workers, longer than `make test` does
	CHAOS_FULL=1 $(PYTEST) -m chaos

fuzz-handoff: $(SETUP) ## 10 000 damaged handoffs and 100 000 clean ones, five to ten minutes; FUZZ=--help
	$(BIN)/python -m tests.chaos.fuzz_handoff $(FUZZ)

bench-peers: pull ## kvrelay beside vLLM and llama.cpp on the same work, half an hour; PEERS=--help
	$(BIN)/python -m kvrelay.cli.bench_peers $(PEERS)

bench-control: pull ## Tokens/s through the coordinator alone, on one core; CONTROL=--help
	$(BIN)/python -m kvrelay.bench.control $(CONTROL)

bench-kv-dtypes: pull ## What fp8 and int8 KV do to logits and to the time of a step, 3 minutes; KV=--help
	$(BIN)/python -m tests.bench.kv_dtypes $(KV)

bench-transfer: $(SETUP) ## How fast KV moves between two processes, half a minute; TRANSFER=--help
	$(BIN)/python -m tests.bench.transfer $(TRANSFER)

gpu: $(if $(GPU_PYTHON),,$(SETUP)) ## What needs a CUDA device: kernel tests, a pair on one GPU, the benchmark
	@$(GPU) -m tests.bench.gpu --check
	$(GPU) -m pytest -q tests/gpu
	$(GPU) -m tests.bench.gpu --out docs/results

check: fmt-check lint type test-fast ## What must hold before a commit; stubs and imports are among the tests

protos: $(SETUP) ## Write the stubs of protos/ into kvrelay/v1
	protos/generate.sh

proto-check: $(SETUP) ## The stubs are those of the protos, and the protos are clean
	$(PYTEST) tests/contract/test_protos.py

fmt: $(SETUP) ## Format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

fmt-check: $(SETUP)
	$(BIN)/ruff format --check .

lint: $(SETUP)
	$(BIN)/ruff check .

type: $(SETUP)
	$(BIN)/mypy

imports: $(SETUP) ## Who may import whom
	$(BIN)/lint-imports

clean: ## Forget .venv and all caches; pulled models stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
