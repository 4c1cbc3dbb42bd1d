"""Drop-in variational solvers whose KSP follows a refinement."""
from __future__ import annotations

from collections.abc import Sequence

import firedrake
from firedrake import LinearVariationalProblem
from firedrake.petsc import PETSc
from firedrake.utils import complex_mode
from pyadjoint import get_working_tape
from pyadjoint.tape import annotate_tape, stop_annotating

from prdp_fem.citation import cite
from prdp_fem.forms import LinearForms
from prdp_fem.inputs import local_values, set_local_values, vector_like
from prdp_fem.krylov import Statistics
from prdp_fem.ladders import Setting
from prdp_fem.linear import LinearSystem
from prdp_fem.options import refinement_from_options
from prdp_fem.point import Point
from prdp_fem.refinement import Refinement
from prdp_fem.tape import LinearSolveBlock

__all__ = ["LinearVariationalSolver", "refinement_from_options"]

_DIFFERENTIATIONS = ("implicit",)


class LinearVariationalSolver(firedrake.LinearVariationalSolver):
    """Firedrake's :class:`firedrake.LinearVariationalSolver`, with its KSP under a refinement.

    A solve is a function of the problem's coefficients and boundary values: it starts from zero, unless ``warm_start``, and
    what was solved before makes no difference. It stands on pyadjoint's tape as one block, and is differentiated
    implicitly: the adjoint system is solved by the same KSP with the setting of the forward solve. The symbolic work is
    done once, here.

    Parameters
    ----------
    problem : LinearVariationalProblem
    refinement : Refinement or None
        Whose ``setting`` is put on the KSP at each solve; None solves as far as the options say.
    differentiation : str
        ``"implicit"``.
    warm_start : bool
        Start from the values of the solution Function instead of zero.
    **kwargs
        As Firedrake's solver takes them: ``solver_parameters``, ``options_prefix``, ``nullspace``, ``transpose_nullspace``,
        ``near_nullspace``, ``appctx``, ``pre_jacobian_callback``, ``post_jacobian_callback``, ``pre_function_callback``,
        ``ad_block_tag``.

    Attributes
    ----------
    statistics : prdp_fem.krylov.Statistics
    problem : LinearVariationalProblem
        What was passed. (Firedrake's side of the solver works on a copy whose coefficients are its own.)

    Notes
    -----
    There is no SNES in a linear solve: its options and monitors have no effect, the KSP's have. Methods that count
    several products as one iteration (bcgsl, ibcgs, …) may run past the budget, by their own way of counting.

    Raises
    ------
    TypeError, ValueError
        For a problem that is not linear, conditions or forms that cannot be differentiated, an unknown ``differentiation``,
        a direct solver under a refinement, and complex PETSc.

    Examples
    --------
    >>> solver = LinearVariationalSolver(problem, refinement=ProgressiveRefinement(IterationLadder()),
    ...                                  solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"})  # doctest: +SKIP
    """

    def __init__(self, problem: LinearVariationalProblem, *, refinement: Refinement | None = None, differentiation: str = "implicit",
                 warm_start: bool = False, **kwargs):
        if complex_mode:
            raise ValueError("this PETSc was configured for complex scalars, and prdp_fem differentiates real solves only: use an "
                             "installation with real scalars")
        if not isinstance(problem, firedrake.NonlinearVariationalProblem):
            raise TypeError(f"expected a LinearVariationalProblem, found a {type(problem).__name__}")
        if differentiation not in _DIFFERENTIATIONS:
            raise ValueError(f"differentiation must be one of {', '.join(map(repr, _DIFFERENTIATIONS))}, found {differentiation!r}")
        for name in ("post_function_callback", "marking_callback"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported: a linear solve assembles no residual; put what it adds into the "
                                 "right-hand side, as a Cofunction")
        self._callbacks = [callback for name in ("pre_function_callback", "pre_jacobian_callback")
                           if (callback := kwargs.pop(name, None)) is not None]
        forms = LinearForms(problem)
        if kwargs.get("appctx"):
            kwargs["appctx"] = {key: forms.copy_of(value) for key, value in kwargs["appctx"].items()}
        super().__init__(forms.problem, **kwargs)
        self.problem = problem
        self.refinement = refinement
        self.differentiation = differentiation
        self.warm_start = bool(warm_start)

        def make_adjoint_solver(adjoint_problem):
            options = {**kwargs, "nullspace": kwargs.get("transpose_nullspace"), "transpose_nullspace": kwargs.get("nullspace")}
            return firedrake.LinearVariationalSolver(adjoint_problem, **options)

        self.system = LinearSystem(forms, self, make_adjoint_solver)
        _collect_garbage(problem.u)

    @property
    def refinement(self) -> Refinement | None:
        """Whose setting is put on the KSP at each solve; it can be exchanged between solves."""
        return self._refinement

    @refinement.setter
    def refinement(self, refinement: Refinement | None) -> None:
        if refinement is not None:
            if not isinstance(refinement, Refinement):
                raise TypeError("refinement must be a Refinement, such as ProgressiveRefinement(IterationLadder()), or "
                                f"FixedRefinement(Iterations(20)) for a constant setting, found {refinement!r}")
            _refuse_direct(self.snes.getKSP())
            cite()
        self._refinement = refinement

    @property
    def statistics(self) -> Statistics:
        """What the solver has done: solves, iterations and seconds, forward and adjoint."""
        return self.system.statistics

    @property
    def setting(self) -> Setting | None:
        """What the next solve puts on the KSP."""
        return None if self.refinement is None else self.refinement.setting

    def get_solution(self) -> firedrake.Function:
        """The user's solution Function."""
        return self.problem.u

    def invalidate_jacobian(self) -> None:
        """Have the operator assembled again at the next solve, even if nothing it depends on seems to have changed."""
        self.system.invalidate()

    @PETSc.Log.EventDecorator()
    def solve(self, bounds=None, **kwargs) -> firedrake.Function:
        """Solve with the setting of the moment, and annotate the solve on the working tape.

        Parameters
        ----------
        bounds
            Not supported: variational inequalities are not linear.
        annotate : bool
            False keeps the solve off the tape.
        ad_block_tag : str
            Overrides that of the constructor.

        Returns
        -------
        Function
            The solution.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            On NaN, breakdown or divergence, and where a tolerance is not reached. The solution is left as it was, and
            nothing is put on the tape.
        """
        if bounds is not None:
            raise ValueError("a problem with bounds is a variational inequality, and not differentiable: solve it with Firedrake's "
                             "NonlinearVariationalSolver")
        annotate = annotate_tape(kwargs)
        tag = kwargs.pop("ad_block_tag", self.ad_block_tag)
        if kwargs:
            raise TypeError(f"solve() takes bounds, annotate and ad_block_tag, found {', '.join(kwargs)}")
        u, setting = self.problem.u, self.setting
        with stop_annotating():
            point = self.point()
            solution = local_values(u)
            self.system.solve(point, setting, solution[None])
        if annotate:
            block = LinearSolveBlock(self.system, self.problem, self.refinement, warm_start=self.warm_start, ad_block_tag=tag)
            get_working_tape().add_block(block)
        with stop_annotating():
            set_local_values(u, solution)
        if annotate:
            block.add_output(u.create_block_variable())
        _collect_garbage(u)
        return u

    def point(self, without: Sequence[int] = ()) -> Point:
        """Where the next solve is made: the present values of the user's coefficients, boundary values and guess.

        Parameters
        ----------
        without : sequence of int
            Inputs whose values are not read, because the caller puts in its own.

        Notes
        -----
        The user's callbacks run first: they may change coefficients.
        """
        if self._callbacks:
            state = vector_like(self.problem.u)
            with self.problem.u.dat.vec_ro as vector:
                vector.copy(state)
            for callback in self._callbacks:
                callback(state)
        return Point(self.system.values(without), self.system.boundary_values(self.problem.bcs),
                     local_values(self.problem.u) if self.warm_start else None)


def _collect_garbage(u: firedrake.Function) -> None:
    """Destroy the PETSc objects that Python has dropped on all ranks, as Firedrake's solvers do after each solve."""
    comm = u.function_space().mesh().comm
    if comm.size > 1:
        PETSc.garbage_cleanup(comm)


def _refuse_direct(ksp: PETSc.KSP) -> None:
    if ksp.getType() in (PETSc.KSP.Type.PREONLY, PETSc.KSP.Type.NONE):
        raise ValueError(
            f"the solver is direct (ksp_type {ksp.getType()} with pc_type {ksp.getPC().getType()}), so there are no iterations to refine: "
            'choose an iterative method, for example solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"} for a symmetric problem '
            'or {"ksp_type": "gmres", "pc_type": "jacobi"} for any other, or leave refinement away')
