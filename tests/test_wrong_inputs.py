"""Wrong inputs, over the whole public API: each is refused in one sentence, before any work.

A row has what is called, the class of the error, and a part of its message. An error has no other
one as its cause, since one sentence says all; and what there was before, such as a solution, a
level, an option or a weight, is there afterwards as it was.
"""

import argparse
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path

import firedrake
import firedrake.adjoint as adjoint
import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.petsc import PETSc
from mpi4py import MPI
from problems import CG, HeatStep

import prdp_fem
from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    NewtonLadder,
    NewtonSteps,
    ProgressiveRefinement,
    Refinement,
    ScheduledRefinement,
    Tolerance,
    ToleranceLadder,
    Unrolled,
    control,
    refinement_from_options,
)
from prdp_fem.history import Account, History
from prdp_fem.memory.devices import find_device
from prdp_fem.solution.differentiation import differentiation_of
from prdp_fem.statistics import Statistics
from prdp_fem.studies import Schedule, Study
from prdp_fem.torch import (
    MLP,
    EnsembleSampler,
    Exchange,
    Gathering,
    GradientReduction,
    GraphNetwork,
    Partition,
    ResNet,
    SolverLayer,
    check_replicas,
    deal,
    from_torch,
    shared,
    to_torch,
    total,
    train,
)

torch.set_num_threads(1)


@dataclass
class Mine:
    """A setting of a user's own class."""

    rtol: object = 0.1
    max_it: object = 5
    budget: object = True


class Own(list):
    """A ladder of a user's own class."""


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no text")


class Things:
    """What rows share, made when it is first asked for."""

    @cached_property
    def heat(self):
        with adjoint.stop_annotating():
            return HeatStep(3)

    @cached_property
    def refinement(self):
        refinement = ProgressiveRefinement(IterationLadder(stop=9))
        for _ in range(4):
            refinement.step(1.0)
        return refinement

    @cached_property
    def solver(self):
        with adjoint.stop_annotating():
            solver = prdp_fem.LinearVariationalSolver(
                self.heat.problem, solver_parameters=CG, refinement=self.refinement
            )
            solver.solve()
        return solver

    @cached_property
    def stock(self):
        with adjoint.stop_annotating():
            return firedrake.LinearVariationalSolver(self.heat.problem, solver_parameters=CG)

    @cached_property
    def nonlinear(self):
        v, u = TestFunction(self.heat.V), Function(self.heat.V, name="u")
        return NonlinearVariationalProblem(((1 + u**2) * u - 1) * v * dx, u)

    @cached_property
    def layer(self):
        return SolverLayer(self.solver, [self.heat.u0])

    @cached_property
    def gathering(self):
        return Gathering(self.heat.V)

    @cached_property
    def vectors(self):
        return Gathering(VectorFunctionSpace(self.heat.mesh, "CG", 1))

    @cached_property
    def partition(self):
        return Partition(self.heat.V)

    @cached_property
    def exchange(self):
        return Exchange(MPI.COMM_SELF, 5, [0, 2])

    @cached_property
    def network(self):
        return torch.nn.Linear(3, 3)

    @cached_property
    def optimiser(self):
        return torch.optim.Adam(self.network.parameters(), 1e-3)

    @cached_property
    def mlp(self):
        return MLP(3, 2)

    @cached_property
    def resnet(self):
        return ResNet(2, 1, (4, 3))

    @cached_property
    def graph(self):
        return GraphNetwork(1, 1, self.gathering.edges, self.gathering.coordinates)

    @cached_property
    def periodic(self):
        return FunctionSpace(PeriodicUnitSquareMesh(4, 4), "CG", 1)

    @cached_property
    def arguments(self):
        return argparse.Namespace(
            schedules=[],
            seeds=[1],
            output=Path("output"),
            resume=False,
            ensemble=None,
            size="quick",
            solver_options="",
        )

    def coordinates(self, value, node=3):
        changed = torch.tensor(self.gathering.coordinates)
        changed[node, 1] = value
        return changed

    def basis(self, space, value):
        with adjoint.stop_annotating():
            return VectorSpaceBasis([Function(space).assign(value)])

    def coinciding(self):
        changed = torch.tensor(self.gathering.coordinates)
        first, second = self.gathering.edges[:, 0]
        changed[first] = changed[second]
        return changed

    def state(self):
        """All that a refused call could have changed, by name."""
        made = vars(self)
        state = {
            "options": dict(PETSc.Options().getAll()),
            "tape": len(adjoint.get_working_tape().get_blocks()),
        }
        if "heat" in made:
            state["values"] = [
                part.dat.data_ro.tolist() for part in (self.heat.u, self.heat.u0, self.heat.kappa)
            ]
        if "refinement" in made:
            state["refinement"] = (
                self.refinement.state_dict(),
                self.refinement.monitors.copy(),
                repr(self.refinement),
            )
        if "solver" in made:
            solver = self.solver
            state["solver"] = (
                vars(solver.statistics).copy(),
                solver.refinement,
                solver.warm_start,
                solver.device,
            )
        if "stock" in made:
            state["stock"] = type(self.stock), sorted(vars(self.stock))
        for name in ("network", "mlp", "resnet", "graph"):
            if name in made:
                weights = [(key, value.tolist()) for key, value in made[name].state_dict().items()]
                state[name] = (
                    made[name].training,
                    weights,
                    [parameter.grad for parameter in made[name].parameters()],
                )
        return state


@pytest.fixture(scope="module")
def things():
    made = Things()
    assert made.solver and made.stock  # which solve, or are looked at by most rows
    return made


ROWS: list = []


def row(name, call, message, error=ValueError):
    ROWS.append(pytest.param(call, error, message, id=name))


def rows(name, call, values, message, error=ValueError):
    """One row for each value, which ``call`` takes behind the things."""
    for value in values:
        text = (
            re.sub(r" at 0x\w+", "", repr(value))
            if not isinstance(value, Unprintable)
            else "unprintable"
        )
        row(f"{name} {text}"[:80], lambda k, value=value: call(k, value), message, error)


NO_COUNT = [0, -1, 2.5, "3", None, True, math.nan]
NO_FRACTION = [0, 1, -0.5, 1.5, math.nan, math.inf, "0.1", None, True]
NO_NUMBER = [None, "1", [1.0], {}, 1j]

# A row reads best on one line.
# fmt: off

# Settings

rows("Iterations", lambda k, v: Iterations(v), [*NO_COUNT, 2**31, 10**30, [1]],
     "iterations must be an integer of at")
rows("Iterations rtol_floor", lambda k, v: Iterations(3, v), [1, -1e-3, math.nan, "0", None],
     "rtol_floor must")
rows("Tolerance", lambda k, v: Tolerance(v), NO_FRACTION, "rtol must")
rows("Tolerance max_it", lambda k, v: Tolerance(0.1, v), [*NO_COUNT, 10**10],
     "max_it must be an integer of at")
rows("NewtonSteps", lambda k, v: NewtonSteps(v), NO_COUNT, "steps must be an integer of at least 1")
rows("NewtonSteps linear", lambda k, v: NewtonSteps(1, v),
     [3, "x", Iterations, NewtonSteps(1), [Iterations(1)]],
     "linear must be the setting of a linear solve", TypeError)
rows("NewtonSteps linear of one's own", lambda k, v: NewtonSteps(1, v),
     [Mine(rtol=-1), Mine(max_it=0)], "in the setting Mine")

# Ladders

for argument in ("start", "step", "stop"):
    rows(f"IterationLadder {argument}", lambda k, v, a=argument: IterationLadder(**{a: v}),
         [v for v in (*NO_COUNT, 2**31) if (argument, v) != ("stop", None)],
         f"{argument} must be an integer of at")
    rows(f"NewtonLadder {argument}", lambda k, v, a=argument: NewtonLadder(**{a: v}),
         [v for v in (*NO_COUNT, 2**31) if (argument, v) != ("stop", None)],
         f"{argument} must be an integer of at")
    name = "factor" if argument == "step" else argument
    rows(f"ToleranceLadder {name}", lambda k, v, a=name: ToleranceLadder(**{a: v}), NO_FRACTION,
         f"{name} must")
row("IterationLadder empty", lambda k: IterationLadder(5, 1, 4), "start must not exceed stop")
row("NewtonLadder empty", lambda k: NewtonLadder(5, 1, 4), "start must not exceed stop")
row("ToleranceLadder empty", lambda k: ToleranceLadder(1e-3, 0.1, 1e-2),
    "start must not be below stop")
rows("ToleranceLadder max_it", lambda k, v: ToleranceLadder(max_it=v), NO_COUNT,
     "max_it must be an integer")
row("IterationLadder sliced without an end", lambda k: IterationLadder()[3:], "has no end")
rows("NewtonLadder linear", lambda k, v: NewtonLadder(linear=v),
     [3, "x", Iterations, NewtonSteps(1), {}],
     "linear must be the setting of a linear solve", TypeError)
rows("NewtonLadder linear entries", lambda k, v: NewtonLadder(linear=v),
     [[Iterations(1), "x"], (None,), Own([1, "x"]), [1, 2.5]],
     "level . of the ladder of the linear solves: a setting must have", TypeError)
rows("NewtonLadder linear numbers", lambda k, v: NewtonLadder(linear=v),
     [[1, 0], [Mine(rtol=2)], [3, 1], []], "of the linear solves")
row("NewtonLadder linear of Newton steps", lambda k: NewtonLadder(linear=[NewtonSteps(1)]),
    "linear must be", TypeError)

# Refinements

LADDERS = {"progressive": ProgressiveRefinement,
           "scheduled": lambda ladder: ScheduledRefinement(ladder, {}), "refinement": Refinement}
for kind, make in LADDERS.items():
    rows(f"{kind} ladder", lambda k, v, make=make: make(v),
         [7, None, "Iterations", b"abc", {0: Iterations(1)}, {1}, iter([Iterations(1)]),
          Iterations(1), IterationLadder,
          (Iterations(i) for i in (1, 2)), np.array([5, 10])],
          "a ladder must be a sequence of settings", TypeError)
    rows(f"{kind} entries", lambda k, v, make=make: make(v),
         [["x"], [1, 2.5], [None], [Iterations], [True], Own([1, "2"]), [[1, 2]]],
         "level . of a ladder: a setting must have", TypeError)
    rows(f"{kind} entries", lambda k, v, make=make: make(v), [[0], [5, -5], [2**31], Own([3, 0])],
         "level . of a ladder: iterations must")
    rows(f"{kind} settings of one's own", lambda k, v, make=make: make([v]), [
        Mine(rtol=-1), Mine(rtol=1), Mine(rtol=math.nan), Mine(rtol=math.inf), Mine(rtol="0.1"),
        Mine(rtol=None), Mine(rtol=True),
        Mine(max_it=0), Mine(max_it=-2), Mine(max_it=2.5), Mine(max_it="5"), Mine(max_it=None),
        Mine(max_it=True), Mine(max_it=2**40),
        Mine(rtol=0.0, budget=False), Mine(rtol=1j), Mine(max_it=math.nan)],
        "level 0 of a ladder: (rtol|max_it) must .* in the setting Mine")
    rows(f"{kind} settings of one's own", lambda k, v, make=make: make([v]),
         [Mine(budget="no"), Mine(budget=1), Mine(budget=None)],
         "budget must be True or False, found .* in the setting Mine", TypeError)
    rows(f"{kind} order", lambda k, v, make=make: make(v),
         [[20, 10], (Tolerance(0.1), Tolerance(0.2)), Own([1, 3, 2])],
         "a ladder goes from coarse to fine")
    rows(f"{kind} empty", lambda k, v, make=make: make(v), [[], (), range(0), Own()],
         "a ladder must have at least one level")
rows("FixedRefinement", lambda k, v: FixedRefinement(v), [20, None, "cg", {"rtol": 0.1}, Iterations,
                                                          IterationLadder(), [Iterations(1)]],
     "a setting must have the attributes", TypeError)
rows("FixedRefinement of one's own", lambda k, v: FixedRefinement(v),
     [Mine(rtol=-1), Mine(max_it=0), Mine(max_it=2.5)], "in the setting Mine")
rows("ScheduledRefinement", lambda k, v: ScheduledRefinement([1, 2], v),
     [None, 3, [0, 1], [(0, 1)], "0: 1"],
     "a schedule must be a dictionary", TypeError)
rows("ScheduledRefinement", lambda k, v: ScheduledRefinement([1, 2], v),
     [{0: 2}, {0: 1, 3: 0}, {-1: 0}, {0: 1.0}, {"0": 1}, {0: None}],
     "schedule maps|not on the ladder|must not decrease")
for argument in ("tau_step", "tau_stop"):
    rows(argument, lambda k, v, a=argument: ProgressiveRefinement([1], **{a: v}),
         [0, -0.5, 1.01, math.nan, math.inf, "0.9", None, True, 10**400],
         rf"{argument} must lie in \(0, 1\]")
for argument in ("ema_window", "error_window"):
    rows(argument, lambda k, v, a=argument: ProgressiveRefinement([1], **{a: v}),
         [*NO_COUNT, 10**400], f"{argument} must be an integer of")
rows("checkpoint", lambda k, v: ProgressiveRefinement([1], checkpoint=v),
     [0, -1, math.nan, "1", None, True, 10**400], "checkpoint must be")
rows("comm of a refinement", lambda k, v: ProgressiveRefinement([1], comm=v),
     ["world", 0, PETSc.COMM_WORLD, MPI, object()],
     "comm must be a communicator", TypeError)
rows("Refinement level", lambda k, v: Refinement([1, 2], level=v), [-1, 2, 1.0, "1", None, True],
     "level must be one of 0 to 1")
rows("step", lambda k, v: k.refinement.step(v), [
    math.nan, math.inf, -math.inf, -1, -1e-300, None, "0.5", "", b"1", [1.0], (), {}, 1j, True,
    10**400, np.nan, np.ones(2), np.array("0.5"),
    np.array(1 + 1j), np.complex128(1), np.bool_(True), np.datetime64("2020"), torch.ones(2),
    torch.tensor(1j), torch.tensor(True),
    torch.tensor(math.nan), torch.tensor(-1.0), torch.empty(()).to("meta"), Decimal("nan"),
    lambda: 0.5, Iterations(3), Unprintable()],
    "a metric must")
rows("level by hand", lambda k, v: setattr(k.refinement, "level", v),
     [-1, 9, 10**30, 2.5, "2", None, True, math.nan, np.float64(1)],
     "level must be one of 0 to 8")
rows("ladder by hand", lambda k, v: setattr(k.refinement, "ladder", v), ["x", 5, [3, "x"]],
     "ladder", TypeError)
row("ladder by hand, too short", lambda k: setattr(k.refinement, "ladder", [3]),
    "level 1 is not on the ladder")
rows("tau_step by hand", lambda k, v: setattr(k.refinement, "tau_step", v), [0, 2, "0.9", None],
     "tau_step must lie")
rows("ema_window by hand", lambda k, v: setattr(k.refinement, "ema_window", v), NO_COUNT,
     "ema_window must be")
rows("load_state_dict", lambda k, v: k.refinement.load_state_dict(v),
     [None, 3, "state", [], [1, 2], b""], "a state must be a dict", TypeError)
for entry in ProgressiveRefinement(IterationLadder(stop=9)).state_dict():
    row(f"state without {entry}", lambda k, e=entry: k.refinement.load_state_dict(
        {name: value for name, value in k.refinement.state_dict().items() if name != e}),
        f"lacks \\['{entry}'\\]")
    rows(f"state with {entry}", lambda k, v,
         e=entry: k.refinement.load_state_dict({**k.refinement.state_dict(), e: v}), [
        v for v in (-1, "x", {}, math.nan, 10**400, [[]], True)
        if (entry, v) != ("checkpoint", True)],
        "state|saved|history|level|metric|checkpoint")
row("state with an entry too many",
    lambda k: k.refinement.load_state_dict({**k.refinement.state_dict(), "x": 1}),
    "has no \\['x'\\]")
rows("state with record", lambda k, v: k.refinement.load_state_dict({**k.refinement.state_dict(),
    "history": [v]}), [
    None, 3, [], [1, 1, 0], [1, 1, 0, False, 1], [math.nan, 1, 0, False], [1, -1, 0, False],
    ["1", 1, 0, False], [1, 1, 9, False],
    [1, 1, -1, False], [1, 1, 0.5, False], [1, 1, 0, 1], [1, 1, 0, "no"], [1, 1, None, False]],
    "record|metric|level|refined")
for name, other in {"ladder": ProgressiveRefinement(IterationLadder(100, 50, 500)),
                    "tau_step": ProgressiveRefinement(
        IterationLadder(stop=9), tau_step=0.5),
        "tau_stop": ProgressiveRefinement(IterationLadder(stop=9), tau_stop=0.5),
        "windows": ProgressiveRefinement(IterationLadder(stop=9), ema_window=3),
        "rule": FixedRefinement(Iterations(1)),
        "longer": ProgressiveRefinement(IterationLadder(stop=10)),
        "endless": ProgressiveRefinement(IterationLadder())}.items():
    row(f"state of another {name}", lambda k, o=other: k.refinement.load_state_dict(o.state_dict()),
        "the state")

# Options


def with_option(option, value, **arguments):
    def call(k):
        PETSc.Options().setValue(option, value)
        try:
            refinement_from_options(**arguments)
        finally:
            PETSc.Options().delValue(option)
    return call


for option in ("start", "step", "stop", "ema_window", "error_window"):
    for value in ("0", "-1", "2.5", "abc", "99999999999", "4294967297", "", "5it", "nan", "inf",
                  "true", "1e3"):
        row(f"-prdp_{option} {value}", with_option(f"prdp_{option}", value),
            f"(?=.*prdp_{option})(?=.*{value})")
for option in ("tau_step", "tau_stop"):
    for value in ("0", "-1", "1.5", "abc", "nan", "inf", "", "0.5s", "1e400"):
        row(f"-prdp_{option} {value}", with_option(f"prdp_{option}", value),
            f"(?=.*prdp_{option})(?=.*{value})")
for value in ("1", "2", "-0.5", "abc", "nan", ""):
    row(f"-prdp_start {value} of tolerances", with_option("prdp_start", value, ladder="tolerances"),
        f"(?=.*prdp_start)(?=.*{value})")
for option in ("monitor", "view"):
    for value in ("maybe", "2", "ascii"):
        row(f"-prdp_{option} {value}", with_option(f"prdp_{option}", value),
            f"-prdp_{option} must be true or false.*{value}")
for value in ("levels", "", "5"):
    row(f"-prdp_ladder {value}", with_option("prdp_ladder", value),
        f"-prdp_ladder must be one of .*{value}")
for option in ("prdp_strat", "prdp_tau", "prdp_devcie", "prdp", "prdp-start", "heat_prdp_strat",
               "heat_prdp_monitr", "PRDP_STRAT"):
    row(f"-{option}", with_option(option, "5"), f"there is no option -{option} 5")
    row(f"-{option} with a prefix", with_option(option, "5", prefix="heat_"),
        f"there is no option -{option} 5")
rows("refinement_from_options prefix", lambda k, v: refinement_from_options(v),
     [None, 5, ["heat_"]], "prefix must be a string", TypeError)
rows("refinement_from_options prefix", lambda k, v: refinement_from_options(v),
     ["-heat_", "heat wave_"], "prefix must have no spaces")
rows("refinement_from_options ladder", lambda k, v: refinement_from_options(ladder=v),
     [None, 5, "x", ["newton"]], "-prdp_ladder must be")
rows("refinement_from_options comm", lambda k, v: refinement_from_options(comm=v), [0, "world"],
     "comm must be a communicator", TypeError)
rows("refinement_from_options start", lambda k, v: refinement_from_options(start=v), NO_COUNT,
     "start must be an integer")
rows("refinement_from_options name", lambda k, v: refinement_from_options(**{v: 1}),
     ["strat", "factor", "monitor"], "no option has the default",
     TypeError)

# Solvers


def solver_of(k, **arguments):
    return prdp_fem.LinearVariationalSolver(k.heat.problem,
                                            **{"solver_parameters": CG, **arguments})


rows("problem", lambda k, v: prdp_fem.LinearVariationalSolver(v), [None, "x", 5, [], HeatStep],
     "expected a LinearVariationalProblem", TypeError)
rows("nonlinear problem", lambda k, v: prdp_fem.NonlinearVariationalSolver(v),
     [None, "x", Iterations(3)],
     "expected a NonlinearVariationalProblem", TypeError)
row("a nonlinear problem for the linear solver",
    lambda k: prdp_fem.LinearVariationalSolver(k.nonlinear), "NonlinearVariationalSolver",
    TypeError)
rows("refinement", lambda k, v: solver_of(k, refinement=v),
     [20, "prdp", Iterations(20), IterationLadder(), ProgressiveRefinement],
     "refinement must be a Refinement", TypeError)
rows("refinement by hand", lambda k, v: setattr(k.solver, "refinement", v), [20, Iterations(20)],
     "refinement must be a Refinement", TypeError)
rows("differentiation", lambda k, v: solver_of(k, differentiation=v),
     [None, "unroled", 5, Unrolled, ["implicit"]], "differentiation must be")
rows("differentiation_of", lambda k, v: differentiation_of(v), [None, "Implicit", {}, True],
     "differentiation must be")
rows("Unrolled checkpoints", lambda k, v: Unrolled(checkpoints=v), [0, -1, 2.5, "3", True],
     "checkpoints must be an integer")
rows("Unrolled steps", lambda k, v: Unrolled(steps=v), [None, "first", 3, ["all"]],
     "steps must be 'all' or 'last'")
rows("warm_start", lambda k, v: solver_of(k, warm_start=v), ["no", 1, None, []],
     "warm_start must be True or False", TypeError)
rows("ksp_prefix", lambda k, v: solver_of(k, ksp_prefix=v), [5, ["ksp_"], True],
     "ksp_prefix must be a string", TypeError)
row("ksp_prefix of none", lambda k: solver_of(k, ksp_prefix="fieldsplit_7_",
                                              refinement=FixedRefinement(Iterations(3))),
                                              "fieldsplit_7_")
rows("device", lambda k, v: solver_of(k, device=v), [5, ["cpu"], True], "device must be a string",
     TypeError)
rows("device", lambda k, v: solver_of(k, device=v), ["gpu", "", "CPU"], "device must be one of")
rows("to", lambda k, v: k.solver.to(v), ["gpu", "", 5, ["cpu"], torch.device("cpu")],
     "device must be one of")
rows("find_device", lambda k, v: find_device(v, MPI.COMM_SELF), ["gpu", None, 5, ["cpu"]],
     "device must be one of")
row("find_device comm", lambda k: find_device("cpu", "world"), "comm must be a communicator",
    TypeError)
rows("solver_parameters", lambda k, v: solver_of(k, solver_parameters=v),
     ["cg", 5, ["ksp_type"], {"ksp_type"}],
     "solver_parameters must be a dictionary", TypeError)
row("solver_parameters key", lambda k: solver_of(k, solver_parameters={5: "cg"}),
    "solver_parameters must have the names of options", TypeError)
rows("solver_parameters of the package", lambda k, v: solver_of(k, solver_parameters={**CG,
    v: "5"}),
     ["prdp_start", "prdp_devcie", "prdp_lader", "sub_prdp_device"], "a solver reads no parameter")
rows("solver_parameters prdp_device", lambda k, v: solver_of(k, solver_parameters={**CG,
    "prdp_device": v}), ["gpu", 5], "device must be one of")
rows("solver_parameters of PETSc", lambda k, v: solver_of(k, solver_parameters=v),
     [{"ksp_type": "cgg"}, {"pc_type": "jacoby"}, {"ksp_type": "cg", "ksp_max_it": "many"},
      {"ksp_type": "cg", "ksp_rtol": "x"}],
     "PETSc refuses the solver parameters for 'solution'")
rows("solver_parameters too large", lambda k, v: solver_of(k, solver_parameters={**CG,
    "ksp_max_it": v}), [2**31, -10**12, 99999999999, np.int64(2**33), "99999999999", "9"*5000],
     "PETSc would make another integer of one beyond 2147483647")
rows("solver_parameters too large inside", lambda k, v: solver_of(k, solver_parameters={
    "ksp_type": "cg", "pc_type": "ksp", "ksp": v}),
     [{"ksp_max_it": 2**31}, {"ksp": {"max_it": -2**31}}, {"pc_bjacobi_lengths": "1,99999999999"}],
     "PETSc would make another integer of one beyond 2147483647")
rows("appctx", lambda k, v: solver_of(k, appctx=v), ["x", 5, [1]], "appctx must be a dictionary",
     TypeError)
rows("options_prefix", lambda k, v: solver_of(k, options_prefix=v), [5, ["heat_"]],
     "options_prefix must be a string", TypeError)
for argument in ("nullspace", "transpose_nullspace", "near_nullspace"):
    rows(argument, lambda k, v, a=argument: solver_of(k, **{a: v}), ["constant", True, [1.0], 5],
         f"{argument} must be a VectorSpaceBasis",
         TypeError)
    row(f"{argument} of another space", lambda k, a=argument: solver_of(k, **{
        a: k.basis(FunctionSpace(k.heat.mesh, "CG", 2), 1)}),
        f"{argument} must be in the space of the solution")
row("nullspace of another mesh", lambda k: solver_of(k, nullspace=k.basis(
    FunctionSpace(UnitSquareMesh(3, 3), "CG", 1), 0.25)), "nullspace must be in the space of the "
                                                          "solution")
row("nullspace of a mixed space",
    lambda k: solver_of(k, nullspace=MixedVectorSpaceBasis(k.heat.V*k.heat.V, [
    VectorSpaceBasis(constant=True, comm=COMM_WORLD), (k.heat.V*k.heat.V).sub(1)])),
    "nullspace must be in the space of the solution")
row("nullspace that is not orthonormal", lambda k: solver_of(k, nullspace=k.basis(k.heat.V, 2)),
    "orthonormal")
rows("callback", lambda k, v: solver_of(k, pre_jacobian_callback=v), [5, "f", [print]],
     "pre_jacobian_callback must be a function", TypeError)
row("callback that is not supported", lambda k: solver_of(k, post_function_callback=print),
    "post_function_callback is not supported")
rows("argument", lambda k, v: solver_of(k, **{v: 1}),
     ["solver_paramters", "refinment", "nullspaces", "prdp"], "takes no argument", TypeError)
rows("solve", lambda k, v: k.solver.solve(**{v: 1}), ["anotate", "tag"],
     "solve\\(\\) takes bounds, annotate and ad_block_tag", TypeError)
row("solve with bounds", lambda k: k.solver.solve(bounds=(k.heat.u, k.heat.u)),
    "variational inequality")
rows("control", lambda k, v: control(v, k.refinement), [None, 5, "solver", HeatStep],
     "expected a Firedrake LinearVariationalSolver", TypeError)
rows("control refinement", lambda k, v: control(k.stock, v),
     [5, "x", Iterations(3), IterationLadder()], "refinement must be a Refinement",
     TypeError)
rows("control argument", lambda k, v: control(k.stock, k.refinement, **{v: 1}),
     ["diferentiation", "solver_parameters", "x"],
     "control\\(\\) takes no argument", TypeError)
rows("control warm_start", lambda k, v: control(k.stock, k.refinement, warm_start=v), ["no", 1],
     "warm_start must be True or False", TypeError)
rows("control device", lambda k, v: control(k.stock, k.refinement, device=v), ["gpu"],
     "device must be one of")
rows("control ksp_prefix", lambda k, v: control(k.stock, k.refinement, ksp_prefix=v), [5],
     "ksp_prefix must be a string", TypeError)

# Networks

for argument in ("inputs", "outputs", "width", "depth"):
    rows(f"MLP {argument}", lambda k, v, a=argument: MLP(**{"inputs": 2, "outputs": 2, a: v}),
         NO_COUNT, f"{argument} must be")
ACTIVATIONS = [5, "tanh", torch.nn.ReLU(), torch.tanh, torch.nn.Linear, dict]
rows("MLP activation", lambda k, v: MLP(2, 2, activation=v), ACTIVATIONS,
     "activation must be a class of modules", TypeError)
rows("MLP forward", lambda k, v: k.mlp(v), [torch.zeros(4), torch.zeros(3, 2), torch.tensor(1.0)],
     "expected last axes of \\(3,\\)")
rows("MLP forward", lambda k, v: k.mlp(v), [np.zeros(3), None, [1, 2, 3]], "x must be a tensor",
     TypeError)
rows("MLP forward", lambda k, v: k.mlp(torch.zeros(3, dtype=v)),
     [torch.float64, torch.int64, torch.complex64], "expected torch.float32", TypeError)
for argument in ("inputs", "outputs", "width", "kernel"):
    rows(f"ResNet {argument}", lambda k, v, a=argument: ResNet(**{"inputs": 1, "outputs": 1,
        "grid": (3,), a: v}), NO_COUNT, f"{argument} must be")
rows("ResNet blocks", lambda k, v: ResNet(1, 1, (3,), blocks=v), [-1, 2.5, None],
     "blocks must be an integer")
rows("ResNet grid", lambda k, v: ResNet(1, 1, v), [(), (2, 2, 2, 2), (3, 0), (2.5,), (3, "4"),
                                                   (None,)], "grid")
rows("ResNet grid", lambda k, v: ResNet(1, 1, v), [5, None, {3}], "grid must be a sequence",
     TypeError)
rows("ResNet periodic", lambda k, v: ResNet(1, 1, (3,), periodic=v), ["no", 1, None],
     "periodic must be True or False", TypeError)
rows("ResNet kernel", lambda k, v: ResNet(1, 1, (3,), kernel=v), [2, 4], "kernel must be odd")
row("ResNet kernel round a grid", lambda k: ResNet(1, 1, (3,), kernel=9, periodic=True),
    "kernel must not reach round")
rows("ResNet activation", lambda k, v: ResNet(1, 1, (3,), activation=v), ACTIVATIONS,
     "activation must be a class of modules", TypeError)
rows("ResNet forward", lambda k, v: k.resnet(v), [torch.zeros(2, 24), torch.zeros(1, 12),
                                                  torch.zeros(12), torch.zeros(4, 12)],
     "expected last axes of \\(2, 12\\)")
rows("ResNet forward", lambda k, v: k.resnet(v), [np.zeros((2, 12)), None], "x must be a tensor",
     TypeError)
row("ResNet forward in double precision", lambda k: k.resnet(torch.zeros(2, 12).double()),
    "expected torch.float32", TypeError)


def graph_of(k, **arguments):
    return GraphNetwork(**{"inputs": 1, "outputs": 1, "edges": k.gathering.edges,
                           "coordinates": k.gathering.coordinates, **arguments})


for argument in ("inputs", "outputs", "width"):
    rows(f"GraphNetwork {argument}", lambda k, v, a=argument: graph_of(k, **{a: v}), NO_COUNT,
         f"{argument} must be")
rows("GraphNetwork steps", lambda k, v: graph_of(k, steps=v), [-1, 2.5, "3", None],
     "steps must be an integer")
rows("GraphNetwork coordinate", lambda k, v: graph_of(k, coordinates=k.coordinates(v)),
     [math.nan, math.inf, -math.inf], "coordinates must be finite")
row("GraphNetwork coinciding points", lambda k: graph_of(k, coordinates=k.coinciding()),
    "must lie at different points")
row("GraphNetwork equal points", lambda k: graph_of(k, coordinates=0*k.gathering.coordinates),
    "must lie at different points")
rows("GraphNetwork coordinates", lambda k, v: graph_of(k, coordinates=v),
     [np.zeros(16), np.zeros((0, 2)), np.zeros((16, 0)), np.zeros((16, 2, 2))],
     "coordinates must have shape \\(n, d\\)")
row("GraphNetwork too few coordinates",
    lambda k: graph_of(k, coordinates=k.gathering.coordinates[:9]),
    "edges must go from nodes 0 to 8")
rows("GraphNetwork coordinates", lambda k, v: graph_of(k, coordinates=v), ["x", None, [["a", "b"]]],
     "edges and coordinates must be tensors",
     TypeError)
rows("GraphNetwork edges", lambda k, v: graph_of(k, edges=v),
     [torch.zeros(3, 4, dtype=torch.long), torch.zeros(4, dtype=torch.long),
     torch.zeros(2, 0, dtype=torch.long), torch.zeros(4, 2, dtype=torch.long)],
     "edges must have shape \\(2, e\\)")
rows("GraphNetwork edges", lambda k, v: graph_of(k, edges=v),
     [torch.tensor([[0], [16]]), torch.tensor([[-1], [0]]), torch.tensor([[99], [0]])],
     "edges must go (from|to) nodes 0 to 15")
rows("GraphNetwork edges", lambda k, v: graph_of(k, edges=v),
     [torch.full((2, 4), 0.5), torch.ones(2, 4, dtype=torch.bool)],
      "edges must be integers", TypeError)
row("GraphNetwork loop", lambda k: graph_of(k, edges=torch.tensor([[0, 3], [1, 3]])),
    "must lie at different points")
PERIODS = [[1.0], [1, 1, 1], [0, 1], [-1, 1], [math.nan, 1], ["1", 1], [None, 1], [True, 1]]
rows("GraphNetwork period", lambda k, v: graph_of(k, period=v), PERIODS, "period")
rows("GraphNetwork period", lambda k, v: graph_of(k, period=v), [1.0, "ab", object()],
     "period must have a number", TypeError)
row("GraphNetwork another period", lambda k: GraphNetwork(
    1, 1, Gathering(k.periodic, period=[1, 1]).edges,
    Gathering(k.periodic, period=[1, 1]).coordinates, period=[2, 1]), "period 2 in direction 0")
rows("GraphNetwork features", lambda k, v: graph_of(k, features=v),
     [torch.zeros(2, 3), torch.zeros(16), torch.full((1, 16), math.nan),
     torch.full((1, 16), math.inf), torch.zeros(1, 16, dtype=torch.complex64)], "features must")
rows("GraphNetwork features", lambda k, v: graph_of(k, features=v), [np.zeros((1, 16)), "x", 5],
     "features must be a tensor", TypeError)
rows("GraphNetwork halo", lambda k, v: graph_of(k, halo=v), ["x", 5, MPI.COMM_SELF],
     "halo must be the halo of a Partition", TypeError)
row("GraphNetwork another halo", lambda k: graph_of(k, halo=k.exchange),
    "coordinates must be those of the 2 nodes that the halo gives")
rows("GraphNetwork activation", lambda k, v: graph_of(k, activation=v), ACTIVATIONS,
     "activation must be a class of modules", TypeError)
rows("GraphNetwork forward", lambda k, v: k.graph(v), [torch.zeros(1, 17), torch.zeros(2, 16),
                                                       torch.zeros(16)],
                                                       "expected last axes of \\(1, 16\\)")
rows("GraphNetwork forward", lambda k, v: k.graph(v), [np.zeros((1, 16)), None],
     "x must be a tensor", TypeError)
row("GraphNetwork forward in double precision", lambda k: k.graph(torch.zeros(1, 16).double()),
    "expected torch.float32", TypeError)

# Exchanges, gatherings, partitions

rows("Exchange comm", lambda k, v: Exchange(v, 3, [0]), ["world", None, 0],
     "comm must be a communicator", TypeError)
rows("Exchange owned", lambda k, v: Exchange(MPI.COMM_SELF, v, [0]),
     [-1, 2.5, "3", None, True, math.nan], "owned must be an integer of at least 0")
rows("Exchange wanted", lambda k, v: Exchange(MPI.COMM_SELF, 3, v),
     [[0.5], [0.0, 2.0], ["0"], [True], 1, [[0, 1]], [[0], [1, 2]], "01", None, [None],
     [math.nan], {0}], "wanted must be a sequence of integers", TypeError)
rows("Exchange wanted", lambda k, v: Exchange(MPI.COMM_SELF, 3, v),
     [[3], [-1], [2**32], [2**62], np.array([2**63], dtype=np.uint64)],
     "numbered from 0 to 2|numbers of nodes")
row("Exchange of no nodes", lambda k: Exchange(MPI.COMM_SELF, 0, [0]), "numbered from 0")
rows("Exchange call", lambda k, v: k.exchange(v),
     [torch.zeros(4), torch.zeros(3, 5), torch.tensor(1.0)], "expected 5 nodes along axis 0")
rows("Exchange call", lambda k, v: k.exchange(v), [np.zeros(5), None, [1.0]*5],
     "values must be a tensor", TypeError)
row("Exchange of complex numbers", lambda k: k.exchange(torch.zeros(5, dtype=torch.complex64)),
    "expected real numbers", TypeError)
rows("Exchange axis", lambda k, v: k.exchange(torch.zeros(5), v), [1, -2, 7],
     "expected 5 nodes along axis")
rows("Exchange axis", lambda k, v: k.exchange(torch.zeros(5), v), [0.0, "0", None, True],
     "axis must be an integer")
SPACES = [None, "CG", 5, UnitIntervalMesh]
for of in (Gathering, Partition):
    rows(f"{of.__name__} space", lambda k, v, of=of: of(v), SPACES, "space must be a FunctionSpace",
         TypeError)
    row(f"{of.__name__} of a mesh", lambda k, of=of: of(k.heat.mesh),
        "space must be a FunctionSpace", TypeError)
    row(f"{of.__name__} of a dual space", lambda k, of=of: of(k.heat.V.dual()),
        "space must be a FunctionSpace", TypeError)
    row(f"{of.__name__} of a mixed space", lambda k, of=of: of(k.heat.V*k.heat.V), "is mixed")
    row(f"{of.__name__} without points", lambda k, of=of: of(FunctionSpace(k.heat.mesh, "RT", 1)),
        "not values at points")
    rows(f"{of.__name__} period", lambda k, v, of=of: of(k.periodic, period=v), PERIODS, "period")
    rows(f"{of.__name__} period", lambda k, v, of=of: of(k.periodic, period=v),
         [1.0, "ab", object()], "period must have a number", TypeError)
    rows(f"{of.__name__} another period", lambda k, v, of=of: of(k.periodic, period=v),
         [[2, 1], [1, 0.5], [1, math.inf], [1.01, 1]],
         "has a period of 1 in direction")
    row(f"{of.__name__} without a period", lambda k, of=of: of(k.periodic),
        "is periodic: name its period")
    row(f"{of.__name__} period of another mesh", lambda k, of=of: of(k.heat.V, period=[1, 1]),
        "has no period in direction 0")
rows("gather", lambda k, v: k.gathering.gather(v),
     [torch.zeros(15), torch.zeros(16, 2), torch.tensor(1.0)], "expected a last axis of 16")
rows("gather", lambda k, v: k.gathering.gather(v), [np.zeros(16), None], "values must be a tensor",
     TypeError)
rows("scatter", lambda k, v: k.gathering.scatter(v),
     [torch.zeros(15), torch.zeros(16, 2), torch.tensor(1.0)], "expected last axes of \\(16,\\)")
rows("scatter", lambda k, v: k.gathering.scatter(v), [np.zeros(16), None], "whole must be a tensor",
     TypeError)
rows("scatter of vectors", lambda k, v: k.vectors.scatter(v), [torch.zeros(32), torch.zeros(16, 2)],
     "expected last axes of \\(2, 16\\)")
rows("by_node", lambda k, v: k.partition.by_node(v),
     [torch.zeros(15), torch.zeros(16, 2), torch.tensor(1.0)], "expected a last axis of 16")
rows("by_node", lambda k, v: k.partition.by_node(v), [np.zeros(16), None], "local must be a tensor",
     TypeError)
rows("by_unknown", lambda k, v: k.partition.by_unknown(v),
     [torch.zeros(16), torch.zeros(2, 8), torch.zeros(16, 1)], "expected last axes of \\(1, 16\\)")
rows("by_unknown", lambda k, v: k.partition.by_unknown(v), [np.zeros((1, 16)), None],
     "values must be a tensor", TypeError)

# Sums and samples

rows("total", lambda k, v: total(v, MPI.COMM_SELF), [1.0, None, np.zeros(2), [1.0]],
     "part must be a tensor", TypeError)
row("total of truth values", lambda k: total(torch.tensor(True), MPI.COMM_SELF),
    "part must be a tensor of numbers", TypeError)
rows("total comm", lambda k, v: total(torch.zeros(2), v), [None, "world", 0],
     "comm must be a communicator", TypeError)
rows("shared", lambda k, v: shared(v, MPI.COMM_SELF), [1.0, None, np.zeros(2)],
     "x must be a tensor", TypeError)
rows("shared comm", lambda k, v: shared(torch.zeros(2), v), [None, "world", 0],
     "comm must be a communicator", TypeError)
rows("GradientReduction", lambda k, v: GradientReduction(v, MPI.COMM_SELF),
     [None, "x", [torch.zeros(3)], torch.nn.Linear],
     "network must be a torch.nn.Module", TypeError)
row("GradientReduction without parameters", lambda k: GradientReduction(torch.nn.Tanh(),
    MPI.COMM_SELF), "no parameters to train")
rows("GradientReduction comm", lambda k, v: GradientReduction(k.network, v), [None, "world"],
     "comm must be a communicator", TypeError)
rows("GradientReduction bucket_size", lambda k, v: GradientReduction(k.network, MPI.COMM_SELF,
    bucket_size=v), NO_COUNT, "bucket_size must be")
rows("check_replicas", lambda k, v: check_replicas(v, k.optimiser, MPI.COMM_SELF), [None, "x"],
     "network must be", TypeError)
rows("check_replicas optimiser", lambda k, v: check_replicas(k.network, v, MPI.COMM_SELF),
     [None, "adam"], "optimiser must be", TypeError)
rows("check_replicas comm", lambda k, v: check_replicas(k.network, k.optimiser, v), [None, "world"],
     "comm must be", TypeError)
rows("EnsembleSampler samples", lambda k, v: EnsembleSampler(v, 2), NO_COUNT, "samples must be")
rows("EnsembleSampler batch_size", lambda k, v: EnsembleSampler(2, v), NO_COUNT,
     "batch_size must be")
rows("EnsembleSampler seed", lambda k, v: EnsembleSampler(2, 2, seed=v),
     [2.5, "1", None, True, 2**64, -2**64], "seed must be an integer")
rows("EnsembleSampler ensemble", lambda k, v: EnsembleSampler(2, 2, ensemble=v),
     [2, "x", MPI.COMM_SELF], "ensemble must be a firedrake.Ensemble",
     TypeError)
rows("deal", lambda k, v: deal(v, None), [[1, 2], None, 3, np.arange(3)],
     "samples must be a tensor", TypeError)
rows("deal", lambda k, v: deal(v, None), [torch.tensor(3), torch.tensor(0.5)],
     "samples must lie along an axis")
rows("deal ensemble", lambda k, v: deal(torch.arange(3), v), [2, MPI.COMM_SELF], "ensemble must be",
     TypeError)

# Conversions

rows("to_torch", lambda k, v: to_torch(v), [None, 1.0, np.zeros(3), torch.zeros(3), "u"],
     "expected a Function, Cofunction, Constant", TypeError)
row("to_torch of a space", lambda k: to_torch(k.heat.V),
    "expected a Function, Cofunction, Constant", TypeError)
rows("to_torch copy", lambda k, v: to_torch(k.heat.u0, copy=v), ["no", 1, None],
     "copy must be True or False", TypeError)
row("to_torch of no vector", lambda k: to_torch(PETSc.Vec()), "expected a vector with values")
rows("from_torch", lambda k, v: from_torch(v, k.heat.V), [None, 1.0, np.zeros(16), [1.0]*16],
     "tensor must be a tensor", TypeError)
rows("from_torch", lambda k, v: from_torch(v, k.heat.V),
     [torch.zeros(15), torch.zeros(2, 8), torch.zeros(1, 16), torch.tensor(1.0)],
     "expected a tensor of 16 values")
rows("from_torch", lambda k, v: from_torch(v, k.heat.V), [torch.zeros(16, dtype=torch.complex128),
                                                          torch.zeros(16).to_sparse()],
     "expected a dense tensor of real numbers", TypeError)
rows("from_torch V", lambda k, v: from_torch(torch.zeros(16), v), ["CG", 5, np.zeros(16)],
     "expected a FunctionSpace", TypeError)
rows("from_torch Constant", lambda k, v: from_torch(v, Constant(1.0)),
     [torch.zeros(2), torch.zeros(0)], "expected a tensor of 1 values")

# Histories and studies

rows("Account solvers", lambda k, v: Account(v), [None, 5], "solvers must be a list", TypeError)
rows("Account solver", lambda k, v: Account([v]), [None, "x", HeatStep],
     "solvers must be those of prdp_fem", TypeError)
rows("Account comm", lambda k, v: Account([], v), [None, "world"], "comm must be a communicator",
     TypeError)
rows("History metric", lambda k, v: History().record(v, k.refinement, Account([])),
     [None, "x", math.nan, -1], "a metric must")
rows("History refinement", lambda k, v: History().record(1.0, v, Account([])), [None, 3],
     "refinement must be", TypeError)
rows("History account", lambda k, v: History().record(1.0, k.refinement, v), [None, 3],
     "account must be", TypeError)
rows("Statistics solves", lambda k, v: Statistics(solves=v), [-1, 2.5, "3", None, True],
     "solves must be an integer of at least 0")
rows("Statistics seconds", lambda k, v: Statistics(forward_seconds=v), [-1, math.nan, "3", None],
     "forward_seconds must be a number of at least 0")
rows("Schedule kind", lambda k, v: Schedule(v), ["x", None, 5, []], "kind must be")
rows("Schedule iterations", lambda k, v: Schedule("constant", v), NO_COUNT,
     "iterations must be an integer")
rows("Schedule thresholds", lambda k, v: Schedule("prdp", tau_step=v, tau_stop=v),
     [0, 2, "0.5", math.nan], "tau_step must lie")
row("Schedule with one threshold", lambda k: Schedule("prdp", tau_step=0.5),
    "both tau_step and tau_stop or none")
row("Schedule of converged physics with iterations", lambda k: Schedule("converged", 3),
    "iterations are those of a constant schedule")
rows("Schedule.from_text", lambda k, v: Schedule.from_text(v),
     ["x", "", "prdp:0.5", "prdp:2:2", "prdp:x:y", "0", "-3", "2.5"], "schedule|tau|prdp")
rows("Schedule.from_text", lambda k, v: Schedule.from_text(v), [None, 5, b"prdp"],
     "text must be a string", TypeError)
rows("Study name", lambda k, v: Study(v, k.arguments, ladder=[1], setup={}), [None, 5],
     "name must be a string", TypeError)
rows("Study name", lambda k, v: Study(v, k.arguments, ladder=[1], setup={}), ["", "a/b"],
     "name must be one that files can have")
rows("Study ladder", lambda k, v: Study("s", k.arguments, ladder=v, setup={}),
     [5, "x", ["x"]], "ladder", TypeError)
rows("Study ladder", lambda k, v: Study("s", k.arguments, ladder=v, setup={}), [[], [0], [3, 1]],
     "ladder")
rows("Study converged", lambda k, v: Study("s", k.arguments, ladder=[1], converged=v, setup={}),
     [1e-10, None, "x"], "a setting must have", TypeError)
rows("Study constant", lambda k, v: Study("s", k.arguments, ladder=[1], constant=v, setup={}),
     [None, 5], "constant must be a function", TypeError)
rows("Study setup", lambda k, v: Study("s", k.arguments, ladder=[1], setup=v), [None, "x", [1]],
     "setup must be a dictionary", TypeError)
rows("Study setup", lambda k, v: Study("s", k.arguments, ladder=[1], setup=v),
     [{"a": torch.zeros(2)}, {"a": math.nan}, {"a": {1, 2}}],
     "setup must be of plain numbers")

# Layers


def called(k, *tensors):
    return k.layer(*tensors)


rows("SolverLayer solver", lambda k, v: SolverLayer(v, [k.heat.u0]),
     [None, "x", 5, torch.nn.Linear(2, 2)], "expected a prdp_fem", TypeError)
row("SolverLayer of a stock solver", lambda k: SolverLayer(k.stock, [k.heat.u0]),
    "expected a prdp_fem", TypeError)
rows("SolverLayer controls", lambda k, v: SolverLayer(k.solver, v), [["u0"], [None], [1.0]],
     "a control must be a Function", TypeError)
row("SolverLayer single control", lambda k: SolverLayer(k.solver, k.heat.u0),
    "controls must be a sequence", TypeError)
row("SolverLayer no control", lambda k: SolverLayer(k.solver, []), "at least one coefficient")
row("SolverLayer control twice", lambda k: SolverLayer(k.solver, [k.heat.u0, k.heat.u0]),
    "named once each")
row("SolverLayer control of another problem", lambda k: SolverLayer(k.solver, [Function(k.heat.V)]),
    "does not depend on|no coefficient|not in")
rows("SolverLayer output", lambda k, v: SolverLayer(k.solver, [k.heat.u0], output=v),
     ["u", 5, [None, "u"]], "an output must be", TypeError)
row("SolverLayer output of another problem", lambda k: SolverLayer(k.solver, [k.heat.u0],
    output=Function(k.heat.V)), "no component of the solution")
rows("layer", called, [None, 1.0, np.zeros(16), [1.0]*16], "expected a tensor", TypeError)
rows("layer", called, [torch.zeros(15), torch.zeros(16, 2), torch.tensor(1.0)],
     "expected a last axis of 16")
rows("layer", called, [torch.zeros(16, dtype=dtype) for dtype in (torch.int64, torch.complex64,
    torch.float16, torch.bfloat16)],
     "expected float32 or float64", TypeError)
row("layer with too many tensors", lambda k: k.layer(torch.zeros(16), torch.zeros(16)),
    "expected 1 tensor", TypeError)
row("layer without tensors", lambda k: k.layer(), "expected 1 tensor", TypeError)

# Training


def trained(k, **arguments):
    given = {"network": k.network, "loss": lambda samples: k.network(torch.zeros(3)).sum(),
             "validate": lambda: 1.0, "optimiser": k.optimiser,
             "refinement": k.refinement, "solvers": [k.solver], "samples": 4, "batch_size": 2,
             "epochs": 1, "progress": False, **arguments}
    return train(given.pop("network"), given.pop("loss"), given.pop("validate"), **given)


for argument in ("samples", "batch_size", "epochs"):
    rows(f"train {argument}", lambda k, v, a=argument: trained(k, **{a: v}), NO_COUNT,
         f"{argument} must be", (TypeError, ValueError))
for argument, values in {"network": [None, "x"], "loss": [None, 5], "validate": [None, 5],
                         "optimiser": [None, "adam"], "refinement": [None, 5],
                         "solvers": [None, 5, ["x"]], "comm": [None, "world"], "ensemble": [2],
                         "scheduler": [5]}.items():
    rows(f"train {argument}", lambda k, v, a=argument: trained(k, **{a: v}), values,
         argument.rstrip("s"), (TypeError, ValueError))
rows("train seed", lambda k, v: trained(k, seed=v), [2.5, "1", None], "seed must be",
     (TypeError, ValueError))
row("train with a refinement that no solver follows",
    lambda k: trained(k, refinement=ProgressiveRefinement([1, 2])), "refinement",
    (TypeError, ValueError))
row("train an optimiser of another network",
    lambda k: trained(k, optimiser=torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1)),
    "parameters that are not the network's")

# fmt: on


def test_there_are_many_rows():
    assert len(ROWS) > 300
    assert len({parameters.id for parameters in ROWS}) > 0.9 * len(ROWS)


@pytest.mark.parametrize("call, error, message", ROWS)
def test_wrong_inputs(things, call, error, message):
    before = things.state()
    with pytest.raises(error) as raised:
        call(things)
    text = str(raised.value)
    assert re.search(message, text), text
    assert "\n" not in text and 10 < len(text) < 700, text
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None or raised.value.__suppress_context__
    after = things.state()
    assert {name: after[name] for name in before} == before
