"""Problems of many kinds, each with its controls, directions for them, and a functional; and checks
of layers on any number of ranks.
"""

import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from problems import CONVERGED, AdvectionDiffusion, HeatStep, same_on_all_ranks, smooth
from ufl import Form

import prdp_fem
from prdp_fem.torch import to_torch

NEWTON = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 0, "snes_linesearch_type": "basic"}


class Case:
    """A problem with its controls, each with a direction, and the functional."""

    def functional(self):
        # Polynomial: the derivatives of others are integrated with errors of their own, by the
        # stock assembly.
        return assemble(inner(self.u, self.u) ** 2 * dx)

    def solve(self, parameters):
        newton = {} if isinstance(self.problem, LinearVariationalProblem) else NEWTON
        self.solver({**parameters, **CONVERGED, **newton}).solve()

    def solver(self, parameters, **options):
        linear = isinstance(self.problem, LinearVariationalProblem)
        solver_type = (
            prdp_fem.LinearVariationalSolver if linear else prdp_fem.NonlinearVariationalSolver
        )
        return solver_type(self.problem, solver_parameters=parameters, **options)


class Heat(Case):
    def __init__(self):
        mesh = UnitSquareMesh(4, 4)
        g = smooth(FunctionSpace(mesh, "CG", 1), 12, "boundary")
        heat = HeatStep(mesh=mesh, boundary=g)
        self.u, self.problem = heat.u, heat.problem
        self.controls = {
            "initial": heat.u0,
            "diffusivity": heat.kappa,
            "time step": heat.dt,
            "boundary": g,
        }


class Transport(Case):
    def __init__(self):
        transport = AdvectionDiffusion(4)
        self.u, self.problem = transport.u, transport.problem
        self.controls = {"source": transport.source, "wind": transport.wind}


class Reaction(Case):
    """A coefficient in a Real space."""

    def __init__(self):
        mesh = UnitSquareMesh(4, 4)
        V, R = FunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "R", 0)
        w = TrialFunction(V)
        v = TestFunction(V)
        self.u = Function(V, name="u")
        rate, f = Function(R, name="rate").assign(1.5), smooth(V, 3)
        self.problem = LinearVariationalProblem(
            (rate * w * v + inner(grad(w), grad(v))) * dx,
            exp(0.3 * f) * v * dx,
            self.u,
            bcs=DirichletBC(V, 0.2, (1, 2)),
        )
        self.controls = {"real rate": rate, "log source": f}


class Elasticity(Case):
    def __init__(self):
        mesh = UnitSquareMesh(3, 3)
        V = VectorFunctionSpace(mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        self.u = Function(V, name="displacement")
        modulus, load = smooth(FunctionSpace(mesh, "DG", 0), 4), smooth(V, 5)
        with stop_annotating():
            modulus.assign(2 + 0.3 * modulus)
        g = Constant((0.1, 0.0), name="grip")
        a = (inner(modulus * sym(grad(w)), sym(grad(v))) + modulus * div(w) * div(v)) * dx
        self.problem = LinearVariationalProblem(
            a, inner(load, v) * dx, self.u, bcs=[DirichletBC(V, 0, 1), DirichletBC(V, g, 2)]
        )
        self.controls = {"modulus": modulus, "load": load}


class Darcy(Case):
    """A mixed problem."""

    def __init__(self):
        mesh = UnitSquareMesh(3, 3)
        W = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
        (s, p) = TrialFunctions(W)
        (t, q) = TestFunctions(W)
        self.u = Function(W, name="flow")
        resistance = smooth(FunctionSpace(mesh, "CG", 1), 6)
        source = smooth(FunctionSpace(mesh, "DG", 0), 7)
        self.problem = LinearVariationalProblem(
            (exp(0.3 * resistance) * inner(s, t) - p * div(t) - q * div(s) - p * q) * dx,
            -source * q * dx,
            self.u,
        )
        self.controls = {"resistance": resistance, "source": source}

    def functional(self):
        flux, pressure = split(self.u)
        return assemble((inner(flux, flux) ** 2 + pressure**4) * dx)


class Load(Case):
    """A Cofunction in the right-hand side."""

    def __init__(self):
        mesh = UnitSquareMesh(4, 4)
        V = FunctionSpace(mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        self.u = Function(V, name="u")
        f = smooth(V, 8)
        load = assemble(f * v * dx)
        self.problem = LinearVariationalProblem(
            (w * v + inner(grad(w), grad(v))) * dx, 2 * load, self.u, bcs=DirichletBC(V, 0, 1)
        )
        self.controls = {"through a cofunction": f}


class Moving(Case):
    """The coordinates of the mesh."""

    def __init__(self):
        with stop_annotating():
            heat = HeatStep(4)
        coordinates = heat.mesh.coordinates
        displacement = Function(coordinates.function_space(), name="displacement")
        coordinates.assign(coordinates + displacement)
        self.u = heat.u
        self.problem = heat.problem
        self.controls = {"mesh": displacement}


class NonlinearDiffusion(Case):
    def __init__(self):
        mesh = UnitSquareMesh(4, 4)
        V = FunctionSpace(mesh, "CG", 1)
        self.u, v = Function(V, name="u"), TestFunction(V)
        f = smooth(V, 1, "f")
        c = Constant(0.7, name="c")
        g = smooth(V, 2, "g")
        F = ((1 + c * self.u**2) * inner(grad(self.u), grad(v)) + self.u * v - f * v) * dx
        self.problem = NonlinearVariationalProblem(F, self.u, bcs=DirichletBC(V, g, (2, 3)))
        self.controls = {"source": f, "constant": c, "boundary": g}


class Burgers(Case):
    def __init__(self):
        mesh = UnitSquareMesh(4, 4)
        V = VectorFunctionSpace(mesh, "CG", 1)
        self.u = Function(V, name="u")
        u0 = smooth(V, 2, "u0")
        v = TestFunction(V)
        nu = smooth(FunctionSpace(mesh, "CG", 1), 4)
        with stop_annotating():
            nu.assign(0.3 + 0.1 * nu)
        F = (
            inner((self.u - u0) / 0.1, v)
            + inner(dot(self.u, nabla_grad(self.u)), v)
            + nu * inner(grad(self.u), grad(v))
        ) * dx
        self.problem = NonlinearVariationalProblem(F, self.u, bcs=DirichletBC(V, 0, "on_boundary"))
        self.controls = {"initial": u0, "viscosity": nu}


def direction_of(control):
    if isinstance(control, Constant):
        return Constant(0.3)
    if same_on_all_ranks(control):
        return Function(control.function_space()).assign(0.3)
    direction = smooth(control.function_space(), 11)
    with stop_annotating():
        direction.assign({"displacement": 0.05}.get(control.name(), 0.5) * direction)
    return direction


def on_fewer(rows, *features, all_on=(1,)) -> list:
    """Parameters of a test, all of them on some numbers of ranks; on others those only that bring
    in a new value of a feature of a row.
    """
    seen, parameters = set(), []
    for row in rows:
        found = {(place, feature(*row)) for place, feature in enumerate(features)}
        name = "-".join(part if isinstance(part, str) else part.__name__ for part in row)
        parameters.append(
            pytest.param(*row, id=name, marks=[] if found - seen else [pytest.mark.ranks(*all_on)])
        )
        seen |= found
    return parameters


def factorised(pc_type: str) -> dict:
    """Options of an incomplete factorisation; on several ranks of each one's block, as PETSc has it
    for the matrices of one only.
    """
    return (
        {"pc_type": pc_type}
        if COMM_WORLD.size == 1
        else {"pc_type": "bjacobi", "sub_pc_type": pc_type}
    )


# Layers


def _random(shape, seed: int, *, same: bool) -> torch.Tensor:
    """Random numbers between 0 and 1, the same ones or other ones on each rank."""
    return torch.rand(
        shape,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed if same else seed + 1000 * COMM_WORLD.rank),
    )


def samples(control, batch=(), seed: int = 0) -> torch.Tensor:
    """Random values of a control, positive as a diffusivity must be."""
    return 0.5 + _random((*batch, to_torch(control).numel()), seed, same=same_on_all_ranks(control))


def gradcheck(layer, inputs, *, eps: float = 1e-6, atol: float = 1e-7, rtol: float = 1e-6) -> bool:
    """torch's gradcheck of a SolverLayer; on several ranks, which torch knows nothing of, by random
    directions and weights.

    There each input, and each output, contributes to what all ranks' dofs do to the outputs of all
    ranks.
    """
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    if COMM_WORLD.size == 1:
        return torch.autograd.gradcheck(layer, inputs, eps=eps, atol=atol, rtol=rtol)

    def outputs(tensors):
        found = layer(*tensors)
        return found if isinstance(found, tuple) else (found,)

    def product(one, other, same):
        own = float((one * other).sum())
        return own if same else COMM_WORLD.allreduce(own)

    asked = layer.output if isinstance(layer.output, (list, tuple)) else [layer.output]
    functional = [isinstance(output, Form) for output in asked]
    for place, (control, tensor) in enumerate(zip(layer.controls, inputs)):
        for seed in range(3):
            direction = _random(tensor.shape, 10 + seed, same=same_on_all_ranks(control)) - 0.5
            values = outputs(inputs)
            weights = [
                _random(value.shape, 20 + seed, same=same) - 0.3
                for value, same in zip(values, functional)
            ]
            (gradient,) = torch.autograd.grad(values, tensor, weights)
            found = product(gradient, direction, same_on_all_ranks(control))
            with torch.no_grad():
                ahead, behind = (
                    outputs(
                        [*inputs[:place], tensor + sign * eps * direction, *inputs[place + 1 :]]
                    )
                    for sign in (1, -1)
                )
            changes = [(one - other) / (2 * eps) for one, other in zip(ahead, behind)]
            expected = sum(product(*factors) for factors in zip(changes, weights, functional))
            np.testing.assert_allclose(
                found, expected, rtol=rtol, atol=atol, err_msg=f"by {control}"
            )
    return True
