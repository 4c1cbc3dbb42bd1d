"""Taylor tests over problems, controls, solvers and ranks, gathered in a table at the end of the
log.

The first remainder falls at rate 2 where the gradient is right, the second at rate 3 where the
Hessian is.
"""

import pytest
from cases import (
    Burgers,
    Darcy,
    Elasticity,
    Heat,
    Load,
    Moving,
    NonlinearDiffusion,
    Reaction,
    Transport,
    direction_of,
    on_fewer,
)
from firedrake import *
from firedrake.adjoint import *

pytestmark = pytest.mark.parallel([1, 2, 3])

KSPS = {
    "cg+jacobi": {"ksp_type": "cg", "pc_type": "jacobi"},
    "cg+gamg": {"ksp_type": "cg", "pc_type": "gamg"},
    "gmres+jacobi": {"ksp_type": "gmres", "pc_type": "jacobi", "ksp_gmres_restart": 200},
    "gmres+sor": {"ksp_type": "gmres", "pc_type": "sor", "ksp_gmres_restart": 200},
    "bcgs+bjacobi": {"ksp_type": "bcgs", "pc_type": "bjacobi"},
    "richardson": {"ksp_type": "richardson", "pc_type": "jacobi", "ksp_richardson_scale": 0.6},
    "chebyshev": {
        "ksp_type": "chebyshev",
        "pc_type": "jacobi",
        "ksp_chebyshev_eigenvalues": "0.05,2.1",
    },
    "minres": {"ksp_type": "minres", "pc_type": "none"},
    "ksp(cg)": {
        "ksp_type": "fgmres",
        "pc_type": "ksp",
        "ksp_ksp_type": "cg",
        "ksp_pc_type": "jacobi",
        "ksp_ksp_rtol": 1e-3,
    },
    "lu": {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"},
}

GRID = [
    (case, control, ksp)
    for case, controls, ksps in (
        (
            Heat,
            ("initial", "diffusivity", "time step", "boundary"),
            ("cg+jacobi", "cg+gamg", "gmres+sor", "richardson", "chebyshev", "ksp(cg)"),
        ),
        (Transport, ("source", "wind"), ("gmres+jacobi", "bcgs+bjacobi", "lu")),
        (Reaction, ("real rate", "log source"), ("cg+jacobi", "minres")),
        (Elasticity, ("modulus", "load"), ("cg+jacobi", "lu")),
        (Darcy, ("resistance", "source"), ("minres", "lu")),
        (Load, ("through a cofunction",), ("cg+jacobi", "richardson")),
        (Moving, ("mesh",), ("cg+jacobi", "gmres+jacobi")),
        (NonlinearDiffusion, ("source", "constant", "boundary"), ("gmres+jacobi", "lu")),
        (Burgers, ("initial", "viscosity"), ("gmres+jacobi", "bcgs+bjacobi")),
    )
    for control in controls
    for ksp in ksps
]


@pytest.mark.parametrize(
    "case, control, ksp",
    on_fewer(GRID, lambda case, control, ksp: (case, control), lambda case, control, ksp: ksp),
)
def test_remainders(case, control, ksp, taylor_table):
    problem = case()
    problem.solve(KSPS[ksp])
    reduced = ReducedFunctional(problem.functional(), Control(problem.controls[control]))
    with stop_annotating():
        direction = direction_of(problem.controls[control])
        if (case, control) == (Darcy, "resistance"):
            # Its third remainders are 1e-16 else, where what rounding errors leave is 1e-17.
            direction.assign(4 * direction)
        results = taylor_to_dict(reduced, problem.controls[control]._ad_copy(), direction)
    rates = [min(results[order]["Rate"]) for order in ("R1", "R2")]
    taylor_table((case.__name__, control, ksp, *rates))
    assert rates[0] > 1.95 and rates[1] > 2.9, f"remainders by {control} with {ksp}: {results}"
