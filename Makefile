# make demo            set up what is missing, and train the heat emulator (QUICK=1: under a minute; RANKS=2: two ranks share the mesh,
#                      with ARGS="--ensemble 2" the samples; ARGS="--help"); DEMO=folder or DEMO=folder/script: another demo
# make reproduce       run all scenarios under all schedules, and renew the tables and figures of docs/results.md (about two hours of
#                      one core; make -j2 for two at a time; runs that are in docs/runs already are taken from there;
#                      QUICK=1: short runs, into build); make poisson, heat, burgers, navier_stokes or autoregressive: the runs of one
#                      scenario; make report: tables and figures of the runs that are there
# make test            set up what is missing, lint (ruff and mypy), and run all tests, serial and on 2 and 3 ranks
# make test-fast       set up what is missing, and run the tests that find most, on one rank, in a minute or so
# make test-device     build a PETSc with OpenCL, once, and run the tests of solves on devices, those of solvers and layers and a demo on it;
#                      PoCL runs OpenCL on the processor, so that no device is needed
# make lint, install   parts of these
# make clean           remove virtual environments and what demos and benchmarks left behind; the caches of built wheels and of
#                      kernels stay, and so do the runs in docs/runs
SHELL := /bin/bash
ACTIVATE := . $${VENV:-.venv}/bin/activate
RANKS ?= 1
DEMO ?= heat_emulator
SCENARIOS := poisson heat burgers navier_stokes autoregressive

.PHONY: demo reproduce report $(SCENARIOS) test test-fast test-device lint install clean

demo: install
	$(ACTIVATE) && mpiexec -n $(RANKS) python demos/$(DEMO)$(if $(findstring /,$(DEMO)),,/$(DEMO)).py $(if $(QUICK),--quick) $(ARGS)

# What is compared in each scenario: converged and progressively refined physics and constant numbers of iterations with each seed; and
# other thresholds with the first, once in each scenario at least.
RUNS := $(if $(QUICK),build/runs,docs/runs)
REPORT := $(if $(QUICK),build/results.md,docs/results.md)
SEEDS := $(if $(QUICK),1,1 2 3)
THRESHOLDS := prdp:0.9:0.9 prdp:0.95:0.9 prdp:0.99:0.9 prdp:0.98:0.8 prdp:0.98:0.95 prdp:0.98:0.99

# $(call study,script and options,constants) and $(call thresholds,script and options); short runs take one of each along
run = $(ACTIVATE) && export OMP_NUM_THREADS=1 && python demos/$(1) --resume --output $(RUNS) $(if $(QUICK),--quick)
study = $(run) --seed $(SEEDS) --schedules converged prdp $(if $(QUICK),$(firstword $(2) $(THRESHOLDS)) $(firstword $(THRESHOLDS)),$(2))
thresholds = $(if $(QUICK),true,$(run) --seed 1 --schedules $(THRESHOLDS))

POISSON := poisson_inverse/poisson_inverse.py
HEAT := heat_emulator/heat_emulator.py
BURGERS := burgers_emulator/burgers_emulator.py
BOX := navier_stokes_corrector/periodic_box.py
CYLINDER := navier_stokes_corrector/cylinder.py
AUTOREGRESSIVE := autoregressive_emulator/autoregressive_emulator.py

poisson: install
	$(call study,$(POISSON),220 330 440 550)
	$(call thresholds,$(POISSON))
	$(call study,$(POISSON) --solver steepest_descent,20 40 60 80)
	$(call study,$(POISSON) --optimiser lbfgs,220 330 440 550)
	$(call study,$(POISSON) --problem three --optimiser lbfgs,110 220 330 440)
	$(call study,$(POISSON) --problem three --solver steepest_descent,40 60 80 160)
	$(call study,$(POISSON) --problem field,40 50 60 80)

heat: install
	$(call study,$(HEAT) --domain plate,4 6 8)
	$(call study,$(HEAT) --domain interval --solver jacobi,5 6 8 12 16)
	$(call thresholds,$(HEAT) --domain interval --solver jacobi)
	$(call study,$(HEAT) --domain square --solver jacobi,8 12 16)
	$(call thresholds,$(HEAT) --domain square --solver jacobi)
	$(call study,$(HEAT) --domain square --solver steepest_descent,3 4 6 8 16)
	$(call thresholds,$(HEAT) --domain square --solver steepest_descent)
	$(call study,$(HEAT) --domain square --solver cg,2 3 5 8)
	$(call thresholds,$(HEAT) --domain square --solver cg)
	$(call study,$(HEAT) --domain cube,4 8)

burgers: install
	$(call study,$(BURGERS) --dimension 1,12 20)
	$(call thresholds,$(BURGERS) --dimension 1)
	$(call study,$(BURGERS) --dimension 2,2 4 8 12)
	$(call thresholds,$(BURGERS) --dimension 2)

navier_stokes: install
	$(call study,$(BOX),40 48 56)
	$(call thresholds,$(BOX))
	$(call study,$(CYLINDER),2 4 8)
	$(if $(QUICK),true,cp $(RUNS)/navier_stokes_cylinder-forces.png $(RUNS)/navier_stokes_cylinder-flow.png docs/results/)

autoregressive: install
	$(call study,$(AUTOREGRESSIVE),4 8)
	$(call thresholds,$(AUTOREGRESSIVE))

reproduce: $(SCENARIOS)
	$(MAKE) report

report: install
	$(if $(QUICK),cp docs/results.md $(REPORT))
	$(ACTIVATE) && python -m prdp_fem.studies.report $(RUNS) $(REPORT)

test: lint
	$(ACTIVATE) && export PYOP2_SPMD_STRICT=1 FIREDRAKE_DISABLE_OPTIONS_LEFT=1 && \
	python -m pytest -n auto --maxprocesses 8 -m "not parallel or parallel[1]" $(ARGS) && \
	mpiexec -n 2 python -m pytest -m "parallel[2]" $(ARGS) && \
	mpiexec -n 3 python -m pytest -m "parallel[3]" $(ARGS)

# Of all rooms, without those tests that take long.
FAST_TESTS := agreement control exchange house imports ladders layer linear_solver networks nonlinear options readme rules \
    schedules tape torch training wrong_inputs

test-fast: install
	$(ACTIVATE) && export PYOP2_SPMD_STRICT=1 FIREDRAKE_DISABLE_OPTIONS_LEFT=1 && \
	python -m pytest -n auto --maxprocesses 8 -m "(not parallel or parallel[1]) and not slow" $(FAST_TESTS:%=tests/test_%.py) $(ARGS)

DEVICE_TESTS := linear_solver layer torch nonlinear unrolled tape correctness control taylor nested options memory

# With one thread of PoCL's for each process. In the second part all that can be on a device is.
test-device:
	VENV= DEVICE=opencl ./install.sh
	. .venv-opencl/bin/activate && export PYOP2_SPMD_STRICT=1 FIREDRAKE_DISABLE_OPTIONS_LEFT=1 POCL_MAX_PTHREAD_COUNT=1 && \
	python -m pytest -n auto --maxprocesses 8 -m "parallel[1]" tests/test_device.py $(ARGS) && \
	mpiexec -n 2 python -m pytest -m "parallel[2]" tests/test_device.py $(ARGS) && \
	export PETSC_OPTIONS="-prdp_device auto" && \
	python -m pytest -n auto --maxprocesses 8 -m "not parallel or parallel[1]" $(DEVICE_TESTS:%=tests/test_%.py) $(ARGS) && \
	python demos/heat_emulator/heat_emulator.py --quick --epochs 20 --schedules prdp 4 && \
	mpiexec -n 2 python demos/heat_emulator/heat_emulator.py --quick --epochs 20 --schedules prdp

lint: install
	$(ACTIVATE) && ruff check && ruff format --check && mypy

install:
	@./install.sh

clean:
	rm -rf .venv .venv-opencl build *.egg-info demos/*/output benchmarks/output docs/runs/*.png
