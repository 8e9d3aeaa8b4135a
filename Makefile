# Every command a person needs; each sets up what it needs in .venv first. `make help` lists them.

PYTHON ?= python3
EXTRA ?= cpu
PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin

# The two builds of ONNX Runtime overwrite each other's files, so the other one goes before this one comes.
ifeq ($(EXTRA),cpu)
OTHER_RUNTIME := onnxruntime-gpu
else ifeq ($(EXTRA),gpu)
OTHER_RUNTIME := onnxruntime
else
$(error EXTRA is '$(EXTRA)': it must be cpu or gpu)
endif

SERVE_READY := $(VENV)/ready-serve-$(EXTRA)
TEST_READY := $(VENV)/ready-test-$(EXTRA)
BENCH_READY := $(VENV)/ready-bench-$(EXTRA)
LOADTEST_READY := $(VENV)/ready-loadtest-$(EXTRA)
DOCS_READY := $(VENV)/ready-docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test test-long bench loadtest docs

help:
	@echo "make serve   install what is missing into .venv and start the service (EXTRA=gpu for an NVIDIA GPU)"
	@echo "make test    install what is missing into .venv and run every check (PROCESSES=2 that share the tests)"
	@echo "make test-long  what takes too long for every change: soak, thousands of cases"
	@echo "make bench   install what is missing into .venv, measure speed, and write it to bench/ (minutes; idle machine)"
	@echo "make loadtest  install what is missing into .venv, find what the service holds, and write it to bench/load/"
	@echo "make docs    install what is missing into .venv and write the documentation's site to build/site"
	@echo "PYTHON=...   the Python (3.11 or later) that .venv is made with; default python3"

serve: $(SERVE_READY)
	$(BIN)/deecap serve

test: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test-long: $(TEST_READY)
	$(BIN)/pytest -m long

bench: $(BENCH_READY)
	$(BIN)/deecap bench --out bench

# Some minutes; `make loadtest LOADTEST="--scale 4"` takes longer and is surer. Every way: LOADTEST=--help.
loadtest: $(LOADTEST_READY)
	$(BIN)/python -m loadtests $(LOADTEST)

docs: $(DOCS_READY)
	$(BIN)/mkdocs build --strict

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' here; install Python 3.11 or later, or say PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); DeeCap needs Python 3.11 or later: say PYTHON=python3.12, for instance" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# An order-only need: the interpreter's own date says nothing about what is installed.
$(SERVE_READY): pyproject.toml | $(BIN)/python
	$(call install,$(EXTRA))
	@touch $@

$(TEST_READY): pyproject.toml | $(BIN)/python
	$(call install,$(EXTRA)$(comma)train$(comma)dev)
	@touch $@ $(SERVE_READY)

$(BENCH_READY): pyproject.toml | $(BIN)/python
	$(call install,$(EXTRA)$(comma)bench)
	@touch $@ $(SERVE_READY)

$(LOADTEST_READY): pyproject.toml | $(BIN)/python
	$(call install,$(EXTRA)$(comma)loadtest)
	@touch $@ $(SERVE_READY)

$(DOCS_READY): pyproject.toml | $(BIN)/python
	$(call install,docs)
	@touch $@

comma := ,
define install
	@echo "Setting up $(VENV) with .[$(1)]: minutes the first time, nothing after that"
	@if $(BIN)/python -m pip show --quiet $(OTHER_RUNTIME) 2>/dev/null; then \
	    rm -f $(VENV)/ready-*; $(BIN)/python -m pip uninstall --yes onnxruntime onnxruntime-gpu; fi
	$(BIN)/python -m pip install --editable '.[$(1)]'
endef
