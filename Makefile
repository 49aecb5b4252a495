# `make` creates what each target needs: a fresh clone on a machine with Python is enough.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check install -qq
INSTALLED := .venv/.installed

# Options for pytest, as in: make test ARGS="-k actorder -x"
ARGS ?=

.PHONY: demo test lint docs bench

demo: $(INSTALLED)
	@.venv/bin/optq demo

test: $(INSTALLED)
	@.venv/bin/python -m pytest -q -n 2 $(ARGS)

lint: $(INSTALLED)
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo

# The first variable silences an advertisement for another site generator.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html; for its search: python -m http.server -d site"

bench: $(INSTALLED)
	@.venv/bin/python bench/solver.py
	@.venv/bin/python bench/pipeline.py

# torch first and alone, at the version that constraints.txt pins: see there.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up .venv: a few hundred megabytes and a minute or two."
	@$(PYTHON) -m venv .venv
	@$(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
