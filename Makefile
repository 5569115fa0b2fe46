# make demo     the whole recipe in miniature, in minutes       make check    format, lint, types, layers
# make test     the test suite                                  make format   rewrite the code as `check` wants it
# make clean    remove .venv and caches; runs/ is kept
#
# Each target first makes .venv with python3 -m venv and pip: make demo PYTHON=python3.12 TORCH="torch==2.12.*"
# torch goes in first and alone, so that a CPU or CUDA build that pip knows of is kept. The choice is remembered.

PYTHON ?= python3
TORCH ?= $(or $(shell cat .venv/.torch 2>/dev/null),torch==2.13.0)
PIP := .venv/bin/python -m pip --disable-pip-version-check
ARGS ?=

.PHONY: demo test check format clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	.venv/bin/kogia demo $(ARGS)

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

check: .venv/.installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright
	.venv/bin/lint-imports --no-logo

format: .venv/.installed-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find kogia tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment ------------------------------------------------------------------------------------------------------

.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "kogia needs Python 3.11 or newer; '$(PYTHON)' is not there. Install python3 or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kogia needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml requirements/lock.txt | .venv/bin/pip
	$(PIP) install "$(TORCH)"
	$(PIP) install -r requirements/lock.txt
	$(PIP) install --no-deps -e .
	@echo "$(TORCH)" > .venv/.torch
	@touch $@

.venv/.installed-dev: .venv/.installed requirements/dev.txt
	$(PIP) install -r requirements/dev.txt
	@touch $@

# Another TORCH than the installed one: install again.
ifneq ($(TORCH),$(shell cat .venv/.torch 2>/dev/null))
.venv/.installed: another-torch
.PHONY: another-torch
another-torch: ;
endif
