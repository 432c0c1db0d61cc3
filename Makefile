# Needs Python 3.11+ and make, nothing else. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --dist loadgroup -q

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export MPLBACKEND ?= Agg

BIN = $(VENV)/bin
# uv takes seconds where pip takes a minute; where uv finds no index of its own, pip installs.
PINNED = --constraint constraints.txt
INSTALL = install() { \
	$(BIN)/python -m pip install -qq --no-compile $(PINNED) uv 2>/dev/null && \
	$(BIN)/uv pip install -q --python $(BIN)/python $(PINNED) --editable "$$1" 2>/dev/null || \
	$(BIN)/python -m pip install -qq --no-compile $(PINNED) --editable "$$1"; }; install

.PHONY: help demo test lint types docs dev clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## show this list
	@echo "usage: make TARGET [PYTHON=python3.12] [VENV=.venv] [PYTEST_ARGS='tests/energy -q']"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile

demo: $(VENV)/.installed-examples ## fit handwritten digits end to end
	$(BIN)/python examples/digits.py

test: $(VENV)/.installed-test ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## check types
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs ## build the documentation into docs/_build
	$(BIN)/python -m sphinx -EW --keep-going -q docs docs/_build

dev: $(VENV)/.installed-dev ## install every tool at once

clean: ## remove everything made here, the virtual environments too
	rm -rf build dist docs/_build .ci/logs .mypy_cache .pytest_cache .ruff_cache
	for d in "$(VENV)" .ci/venv-*; do if [ -f "$$d/pyvenv.cfg" ]; then rm -rf "$$d"; fi; done
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per extra: pip runs again only when the metadata or the pins change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing ebm_ppl[$*] into $(VENV)"
	@$(INSTALL) ".[$*]"
	@touch $@

# dev contains test and docs, so these need no install of their own.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing ebm_ppl[dev] into $(VENV)"
	@$(INSTALL) ".[dev]"
	@touch $(VENV)/.installed-test $(VENV)/.installed-docs $@

$(BIN)/python:
	@found=$$("$(PYTHON)" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) || found="no working Python"; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: ebm_ppl needs Python >= 3.11, but '$(PYTHON)' is $$found." >&2; \
		echo "Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
