# make demo | test | test-slow | docs-check | style | quality | clean
#
# VENV         the environment that is made and used; `make VENV= PYTHON=python` uses an environment of your own as it is
# PYTHON       the interpreter the environment is made from
# TORCH        what pip installs first; skipped where torch can be imported already. Where PyTorch's default wheel is the
#              CUDA build (several GB) and there is no GPU: TORCH='torch==2.13.0 --index-url <PyTorch's CPU index>'
# SYSTEM_SITE  1: the environment also sees the interpreter's own packages, such as its torch
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
SYSTEM_SITE ?= 0
EXTRAS ?= dev,features,tracking,data,video,search,text

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
STAMP := build/installed
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
endif

.PHONY: demo setup test test-slow docs-check style quality clean

demo: setup
	OMP_NUM_THREADS=1 $(RUN) -m entrecipes run digits/demo
	@echo
	@echo 'The command line: source $(VENV)/bin/activate, then entrecipes --help'

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
ifneq ($(strip $(VENV)),)
	test -x $(RUN) || $(PYTHON) -m venv $(if $(filter 1,$(SYSTEM_SITE)),--system-site-packages) $(VENV)
endif
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install $(TORCH)
	$(RUN) -m pip install -e '.[$(EXTRAS)]'
	mkdir -p $(@D) && touch $@

test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest

test-slow: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

# every code block and command of README, docs and recipes, and how each was checked
docs-check: setup
	OMP_NUM_THREADS=1 $(RUN) scripts/check_docs.py

style: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

quality: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache
