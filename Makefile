# make demo            set up what is missing, and train the heat emulator twice (QUICK=1: under a minute; RANKS=2: in parallel);
#                      DEMO=suboptimality: how wrong truncated solves and their derivatives are
# make test            set up what is missing, lint, and run all tests, serial and on 2 and 3 ranks
# make lint, install   parts of these
# make clean           remove the virtual environment and what runs left behind; the caches of built wheels and kernels stay
SHELL := /bin/bash
ACTIVATE := . $${VENV:-.venv}/bin/activate
RANKS ?= 1
DEMO ?= heat_emulator

.PHONY: demo test lint install clean

demo: install
	$(ACTIVATE) && mpiexec -n $(RANKS) python demos/$(DEMO)/$(DEMO).py $(if $(QUICK),--quick) $(ARGS)

test: lint
	$(ACTIVATE) && export PYOP2_SPMD_STRICT=1 FIREDRAKE_DISABLE_OPTIONS_LEFT=1 && \
	python -m pytest -m "not parallel or parallel[1]" $(ARGS) && \
	mpiexec -n 2 python -m pytest -m "parallel[2]" $(ARGS) && \
	mpiexec -n 3 python -m pytest -m "parallel[3]" $(ARGS)

lint: install
	$(ACTIVATE) && ruff check

install:
	@./install.sh

clean:
	rm -rf .venv build *.egg-info demos/*/output
