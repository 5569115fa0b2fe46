# make demo     the whole recipe in miniature, in minutes       make check    format, lint, types, layers
# make test     the test suite                                  make format   rewrite the code as `check` wants it
# make audit    advisories on the pins, licences                make lock     hashes of all pins, after changing one
# make clean    remove .venv and caches; runs/ is kept
#
# Each target first makes .venv with python3 -m venv and pip: make demo PYTHON=python3.12 TORCH="torch==2.12.*"
# Everything has hashes but torch, which is yours: a CPU or CUDA build that pip knows of. The choice is remembered.

PYTHON ?= python3
TORCH ?= $(or $(shell cat .venv/.torch 2>/dev/null),torch==2.13.0)
PIP := .venv/bin/python -m pip --disable-pip-version-check
ARGS ?=
LOCKS := $(wildcard requirements/*.txt)
COMPILE := .venv/tools/bin/uv pip compile --universal --python-version 3.11 --no-deps --generate-hashes \
	--no-annotate --no-header
# An advisory that is known to be there: true only where there is a network, and advisories on it.
ADVISED := from urllib.request import urlopen; \
	assert b"CVE-2025-27516" in urlopen("https://pypi.org/pypi/Jinja2/3.1.5/json", timeout=5).read()

.PHONY: demo test check audit format lock clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	.venv/bin/kogia demo $(ARGS)

# Plugins by name: pytest rewrites the asserts of all packages among which it looks for plugins, a third of its start.
test: .venv/.installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --disable-plugin-autoload -p hypothesispytest -p jaxtyping -p timeout \
	    -p xdist -n 2 --dist worksteal $(ARGS)

check: .venv/.installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright
	.venv/bin/lint-imports --no-logo
	@if .venv/bin/python -c '$(ADVISED)' 2>/dev/null; \
	then $(MAKE) --no-print-directory audit || echo "make audit: see above; that is no failure of make check"; \
	else echo "make audit: left out, the public advisories cannot be reached from here"; fi

# The licences of what is installed, then the known holes of what is pinned: a new one fails this, not `check`.
audit: .venv/.installed-dev .venv/tools/.installed
	.venv/tools/bin/pip-licenses --python .venv/bin/python --order license
	.venv/tools/bin/pip-audit --strict --disable-pip --require-hashes --timeout 10 $(LOCKS:%=-r %)

format: .venv/.installed-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

lock: .venv/tools/.installed
	for file in $(LOCKS); do \
	    { grep '^#' $$file; $(COMPILE) $$file; } > $$file.new && mv $$file.new $$file || exit 1; \
	done

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find kogia tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment ------------------------------------------------------------------------------------------------------

.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "kogia needs Python 3.11 or newer; '$(PYTHON)' is not there. Install python3 or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kogia needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml requirements/build.txt requirements/lock.txt | .venv/bin/pip
	$(PIP) install --require-hashes -r requirements/build.txt
	$(PIP) install --require-hashes --no-build-isolation -r requirements/lock.txt
	$(PIP) install "$(TORCH)"
	$(PIP) install --no-deps --no-build-isolation -e .
	@echo "$(TORCH)" > .venv/.torch
	@touch $@

.venv/.installed-dev: .venv/.installed requirements/dev.txt requirements/triton.txt
	$(PIP) install --require-hashes --no-deps -r requirements/dev.txt
	.venv/bin/python -c 'import triton' 2>/dev/null || $(PIP) install --require-hashes --no-deps -r requirements/triton.txt
	@touch $@

.venv/tools/.installed: requirements/tools.txt | .venv/bin/pip
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/python -m pip --disable-pip-version-check install --require-hashes -r requirements/tools.txt
	@touch $@

# Another TORCH than the installed one: install again.
ifneq ($(TORCH),$(shell cat .venv/.torch 2>/dev/null))
.venv/.installed: another-torch
.PHONY: another-torch
another-torch: ;
endif
