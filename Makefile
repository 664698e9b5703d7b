# make check | test | test-all | docs | benchmarks. PYTHON names another environment's Python: make check PYTHON=python3
PYTHON ?= $(firstword $(wildcard .venv/bin/python) python3)
BIN := $(patsubst %/,%,$(dir $(PYTHON)))
# The tools of that environment first; those of the shell where there are none.
export PATH := $(if $(findstring /,$(PYTHON)),$(abspath $(BIN)):)$(PATH)

.PHONY: help check test test-all docs

help:
	@echo "make check     lint, format, import contracts and types: seconds"
	@echo "make test      the tests that a change should pass while you write it: two to three minutes on two cores"
	@echo "make test-all  every test that needs no package registry, slow ones too"
	@echo "make docs      write what the documentation generates: families, scaling, the picture of the house"

check:
	.ci/check

test:
	$(PYTHON) -m pytest

test-all:
	$(PYTHON) -m pytest -m ""

docs:
	$(PYTHON) docs/generate.py
