# make quickstart   extend a small Megatron model from 256 to 8192 tokens (25 minutes on 2 cores)
# make test         everything, CPU only (20 minutes on 2 cores);  make test-fast: 3 minutes
# make style        ruff (lint and format)
# Each installs what it needs into $(VENV) first.

VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-fast style format constraints clean

quickstart: $(STAMP)
	$(PYTHON) examples/quickstart/quickstart.py

test: $(STAMP)
	$(PYTHON) -m pytest

test-fast: $(STAMP)
	$(PYTHON) -m pytest -m "not slow"

style: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

$(STAMP): setup.py pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --seed --python 3.12 $(VENV); \
	elif python3.12 -c "" >/dev/null 2>&1; then \
		python3.12 -m venv $(VENV); \
	else \
		echo "make: neither python3.12 nor uv is on the PATH; install Python 3.12" \
		     "(for example: apt install python3.12-venv, pyenv install 3.12) or uv, then run" \
		     "make again" >&2; exit 1; \
	fi
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

constraints: $(STAMP)
	( head -n 1 constraints.txt; $(PYTHON) -m pip freeze --exclude-editable ) > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
