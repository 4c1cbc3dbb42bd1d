"""Where data goes: the calls within prdp_fem that a solve or a derivative makes, and those from one
file to another.

A trip that crosses few files is one that a reader can follow. Each is made a few times before it is
counted, so that what is made once, such as forms, is made; on one rank, by a batch of five samples
and four iterations each.

    python trips.py                 a table
    python trips.py --show "layer, backward"         and the calls of a trip, one a line
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything is imported that starts threads

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from firedrake import (
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    TestFunction,
    TrialFunction,
    UnitSquareMesh,
    assemble,
    dx,
    grad,
    inner,
)
from firedrake.adjoint import (
    Control,
    ReducedFunctional,
    continue_annotation,
    pause_annotation,
    set_working_tape,
)

import prdp_fem
from prdp_fem import FixedRefinement, IterationLadder, Iterations, ProgressiveRefinement
from prdp_fem.torch import SolverLayer

PACKAGE = Path(prdp_fem.__file__).parent
BATCH, ITERATIONS = 5, 4
CG = {"ksp_type": "cg", "pc_type": "jacobi"}


# What is counted
# ---------------


@dataclass
class Trip:
    """The calls of functions of the package, each with the file that it was called from."""

    calls: list[tuple[str, str, str]]

    @classmethod
    def of(cls, make: Callable[[], None]) -> "Trip":
        """The calls that are made, in this thread: torch goes backwards in it, too, on the CPU."""
        trip = cls([])
        sys.setprofile(trip._note)
        try:
            make()
        finally:
            sys.setprofile(None)
        return trip

    def _note(self, frame: FrameType, event: str, _) -> None:
        if event != "call":
            return
        file = _file(frame)
        if file is None or frame.f_code.co_name.startswith("<"):
            return  # a comprehension is part of its function
        caller = frame.f_back
        while caller is not None and _file(caller) is None:
            caller = caller.f_back
        origin = "" if caller is None else _file(caller)
        self.calls.append((origin, file, frame.f_code.co_qualname))

    @property
    def across(self) -> list[tuple[str, str, str]]:
        """Those into another file of the package than the one that they come from."""
        return [call for call in self.calls if call[0] and call[0] != call[1]]

    @property
    def files(self) -> set[str]:
        return {file for _, file, _ in self.calls}


def _file(frame: FrameType) -> str | None:
    """The file of the package that a frame is in; None where it is in none."""
    path = frame.f_code.co_filename
    return path[len(str(PACKAGE)) + 1 :] if path.startswith(f"{PACKAGE}{os.sep}") else None


# The trips
# ---------


class HeatStep:
    """An implicit step of heat conduction, with old temperature and diffusivity as controls."""

    def __init__(self):
        V = FunctionSpace(UnitSquareMesh(8, 8), "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        self.u0, self.u = Function(V, name="u0"), Function(V, name="u")
        self.kappa = Function(V, name="kappa").assign(1)
        a = (w * v + 1e-3 * self.kappa * inner(grad(w), grad(v))) * dx
        self.problem = LinearVariationalProblem(a, self.u0 * v * dx, self.u)

    def solver(self, **options) -> prdp_fem.LinearVariationalSolver:
        """A solver that makes so many iterations."""
        return prdp_fem.LinearVariationalSolver(
            self.problem,
            refinement=FixedRefinement(Iterations(ITERATIONS)),
            solver_parameters=CG,
            **options,
        )


def through_layer(control: str, **options) -> tuple[Trip, Trip]:
    """Forward and backward through a layer, for samples of one control."""
    step = HeatStep()
    layer = SolverLayer(step.solver(**options), [getattr(step, control)])
    size = step.u.dat.data_ro.size
    outputs: list[torch.Tensor] = []
    for _ in range(3):
        samples = torch.rand(BATCH, size, dtype=torch.float64).add_(0.5).requires_grad_()
        forward = Trip.of(lambda samples=samples: outputs.append(layer(samples)))
        backward = Trip.of(partial(outputs[-1].backward, torch.ones_like(outputs[-1])))
    return forward, backward


def on_tape() -> tuple[Trip, Trip]:
    """Replay and derivative of a solve on pyadjoint's tape."""
    step = HeatStep()
    solver = step.solver()
    with set_working_tape():
        continue_annotation()
        solver.solve()
        functional = ReducedFunctional(assemble(step.u**2 * dx), Control(step.u0))
        pause_annotation()
        value = Function(step.u.function_space())
        for number in range(3):
            value.dat.data[:] = number
            replay = Trip.of(partial(functional, value))
            derivative = Trip.of(functional.derivative)
    return replay, derivative


def of_a_refinement() -> Trip:
    """One step of a refinement that goes up."""
    refinement = ProgressiveRefinement(IterationLadder(), ema_window=1, error_window=1)
    refinement.step(1.0)
    return Trip.of(lambda: refinement.step(1.0))


def trips() -> dict[str, Trip]:
    """All trips by their names."""
    found = {}
    for name, control, options in [
        ("layer", "u0", {}),
        ("diffusivity", "kappa", {}),
        ("unrolled", "u0", {"differentiation": "unrolled"}),
    ]:
        forward, backward = through_layer(control, **options)
        found[f"{name}, forward"], found[f"{name}, backward"] = forward, backward
    found["tape, replay"], found["tape, derivative"] = on_tape()
    found["refinement, step"] = of_a_refinement()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", metavar="TRIP", help="list the calls of a trip")
    arguments = parser.parse_args()
    found = trips()
    if arguments.show and arguments.show not in found:
        parser.error(f"there is no trip '{arguments.show}': there are {', '.join(found)}")
    print("| trip | calls | files | calls across files |")
    print("| --- | ---: | ---: | ---: |")
    for name, trip in found.items():
        print(f"| {name} | {len(trip.calls)} | {len(trip.files)} | {len(trip.across)} |")
    if arguments.show:
        for origin, file, function in found[arguments.show].calls:
            print(f"{origin or '(from outside)':32} -> {file:32} {function}")


if __name__ == "__main__":
    main()
