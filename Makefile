# make demo | test | lab | serve | site | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive
unexport PYTHONDONTWRITEBYTECODE  # the many processes that tests start read what the first one compiled
ALONE := tests/test_light.py  # it measures

.PHONY: demo test lint notebooks docs lab serve clean

demo: $(VENV)/.installed
	$(BIN)/rlhfw model
	$(BIN)/rlhfw demo

test: $(VENV)/.installed-dev
	$(MAKE) -j3 lint notebooks docs
	timeout 200 $(BIN)/pytest $(ALONE)
	timeout 1800 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(ALONE))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check nbs tests setup.py
	$(BIN)/ruff check nbs tests setup.py rlhf_workbench
	timeout 600 $(BIN)/mypy

notebooks: $(VENV)/.installed-dev
	timeout 900 $(BIN)/nbdev-test --n-workers 2

# What the site is made of, without Quarto. Most of nbdev's time would go into reading pyproject.toml again for every
# cell, and into what each of the hundreds of shells does at exit.
docs: $(VENV)/.installed-dev
	timeout 600 $(BIN)/python -c "import os; from functools import cache; import nbdev.config as c; \
		c._load_toml = cache(c._load_toml); from nbdev.serve import proc_nbs; proc_nbs(n_workers=0); os._exit(0)"

lab: $(VENV)/.installed
	$(BIN)/jupyter lab nbs/tutorials

serve: $(VENV)/.installed
	$(BIN)/rlhfw serve

clean:
	rm -rf $(VENV) _proc _docs build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pip is quiet about what it already has, so a second run takes no time and needs no network.
$(VENV)/.installed: $(VENV)/bin/python settings.ini constraints.txt pyproject.toml setup.py
	timeout 1500 $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	timeout 900 $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[all,dev]'
	@touch $@
