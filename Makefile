# make demo            set up what is missing, and train the heat emulator (QUICK=1: under a minute; RANKS=2: two ranks share the mesh,
#                      with ARGS="--ensemble 2" the samples; ARGS="--help"); DEMO=folder or DEMO=folder/script: another demo
# make reproduce       run all scenarios under all schedules, and renew the tables and figures of docs/results.md (about five hours of
#                      one core; make -j2 for two at a time; runs that are in docs/runs already are taken from there;
#                      QUICK=1: short runs, into build); make poisson, heat, burgers, navier_stokes, autoregressive or conductivity: the
#                      runs of one scenario; make report: tables and figures of the runs that are there
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
SCENARIOS := poisson heat burgers navier_stokes autoregressive conductivity

.PHONY: demo reproduce report $(SCENARIOS) test test-fast test-device lint install clean

demo: install
	$(ACTIVATE) && mpiexec -n $(RANKS) python demos/$(DEMO)$(if $(findstring /,$(DEMO)),,/$(DEMO)).py $(if $(QUICK),--quick) $(ARGS)

# What is compared in each scenario: converged and progressively refined physics, what a user would do otherwise, that is, a direct
# solver, constant tolerances and good preconditioners, and constant numbers of iterations, with each seed; and other thresholds with
# the first, once in each scenario at least. There are five seeds where all runs of a study take less than a minute, and three elsewhere.
RUNS := $(if $(QUICK),build/runs,docs/runs)
REPORT := $(if $(QUICK),build/results.md,docs/results.md)
FEW := $(if $(QUICK),1,1 2 3)
MANY := $(if $(QUICK),1,1 2 3 4 5)
THRESHOLDS := prdp:0.9:0.9 prdp:0.95:0.9 prdp:0.99:0.9 prdp:0.98:0.8 prdp:0.98:0.95 prdp:0.98:0.99

# $(call study,script and options,seeds,constants), $(call contestants,script and options with another --solver,seeds,tolerances) and
# $(call thresholds,script and options); short runs take one of each along
run = $(ACTIVATE) && export OMP_NUM_THREADS=1 && python demos/$(1) --resume --output $(RUNS) $(if $(QUICK),--quick)
study = $(run) --seed $(2) --schedules converged direct rtol:1e-2 prdp $(if $(QUICK),$(firstword $(3) $(THRESHOLDS)) $(firstword $(THRESHOLDS)),$(3))
contestants = $(run) --seed $(2) --schedules $(if $(QUICK),$(firstword $(3)),$(3))
thresholds = $(if $(QUICK),true,$(run) --seed 1 --schedules $(THRESHOLDS))

POISSON := poisson_inverse/poisson_inverse.py
HEAT := heat_emulator/heat_emulator.py
BURGERS := burgers_emulator/burgers_emulator.py
BOX := navier_stokes_corrector/periodic_box.py
CYLINDER := navier_stokes_corrector/cylinder.py
AUTOREGRESSIVE := autoregressive_emulator/autoregressive_emulator.py
CONDUCTIVITY := conductivity_network/conductivity_network.py

poisson: install
	$(call study,$(POISSON),$(MANY),220 330 440 550)
	$(call thresholds,$(POISSON))
	$(call contestants,$(POISSON) --solver cg+icc,$(MANY),rtol:1e-6)
	$(call study,$(POISSON) --solver steepest_descent,$(MANY),20 40 60 80)
	$(call study,$(POISSON) --optimiser lbfgs,$(MANY),220 330 440 550)
	$(call contestants,$(POISSON) --optimiser lbfgs --solver cg+icc,$(MANY),rtol:1e-6)
	$(call study,$(POISSON) --problem three --optimiser lbfgs,$(MANY),110 220 330 440)
	$(call contestants,$(POISSON) --problem three --optimiser lbfgs --solver cg+icc,$(MANY),rtol:1e-6)
	$(call study,$(POISSON) --problem three --solver steepest_descent,$(MANY),40 60 80 160)
	$(call contestants,$(POISSON) --problem three --solver cg+icc,$(MANY),rtol:1e-6)
	$(call study,$(POISSON) --problem field,$(MANY),40 50 60 80)
	$(call contestants,$(POISSON) --problem field --solver cg+icc,$(MANY),rtol:1e-6 rtol:1e-4)

heat: install
	$(call study,$(HEAT) --domain plate,$(MANY),4 6 8)
	$(call contestants,$(HEAT) --domain plate --solver cg+icc,$(MANY),rtol:1e-6 rtol:1e-2)
	$(call study,$(HEAT) --domain interval --solver jacobi,$(MANY),5 6 8 12 16)
	$(call thresholds,$(HEAT) --domain interval --solver jacobi)
	$(call contestants,$(HEAT) --domain interval --solver cg+icc,$(MANY),rtol:1e-6)
	$(call study,$(HEAT) --domain square --solver jacobi,$(MANY),8 12 16)
	$(call thresholds,$(HEAT) --domain square --solver jacobi)
	$(call study,$(HEAT) --domain square --solver steepest_descent,$(MANY),3 4 6 8 16)
	$(call thresholds,$(HEAT) --domain square --solver steepest_descent)
	$(call study,$(HEAT) --domain square --solver cg,$(MANY),2 3 5 8)
	$(call thresholds,$(HEAT) --domain square --solver cg)
	$(call contestants,$(HEAT) --domain square --solver cg+icc,$(MANY),rtol:1e-6 rtol:1e-2)
	$(call study,$(HEAT) --domain cube,$(FEW),4 8)
	$(call contestants,$(HEAT) --domain cube --solver cg+icc,$(FEW),rtol:1e-6 rtol:1e-2)

burgers: install
	$(call study,$(BURGERS) --dimension 1,$(MANY),12 20)
	$(call thresholds,$(BURGERS) --dimension 1)
	$(call contestants,$(BURGERS) --dimension 1 --solver gmres+ilu,$(MANY),rtol:1e-6 rtol:1e-3)
	$(call study,$(BURGERS) --dimension 2,$(FEW),2 4 8 12)
	$(call thresholds,$(BURGERS) --dimension 2)
	$(call contestants,$(BURGERS) --dimension 2 --solver gmres+ilu,$(FEW),rtol:1e-6 rtol:1e-3)

navier_stokes: install
	$(call study,$(BOX),$(FEW),40 48 56)
	$(call thresholds,$(BOX))
	$(call contestants,$(BOX) --solver gmres+ilu,$(FEW),rtol:1e-6 rtol:1e-3)
	$(call study,$(CYLINDER),$(FEW),2 4 8)
	$(if $(QUICK),true,cp $(RUNS)/navier_stokes_cylinder-forces.png $(RUNS)/navier_stokes_cylinder-flow.png docs/results/)
	$(call contestants,$(CYLINDER) --solver gmres+ilu1,$(FEW),rtol:1e-6 rtol:1e-3)

autoregressive: install
	$(call study,$(AUTOREGRESSIVE),$(MANY),4 8)
	$(call thresholds,$(AUTOREGRESSIVE))
	$(call contestants,$(AUTOREGRESSIVE) --solver gmres+ilu,$(MANY),rtol:1e-6 rtol:1e-3)

conductivity: install
	$(call study,$(CONDUCTIVITY),$(FEW),16 64)
	$(call contestants,$(CONDUCTIVITY) --solver cg+icc,$(FEW),rtol:1e-6 rtol:1e-2)

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
