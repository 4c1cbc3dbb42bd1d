"""The drop-in solvers: Firedrake's, with their KSP under a refinement."""

from __future__ import annotations

import firedrake
from firedrake import NonlinearVariationalProblem

from prdp_fem.freshness import UNSEEN
from prdp_fem.krylov.petsc_types import snes_facts
from prdp_fem.refinement.rules import Refinement
from prdp_fem.solution.differentiation import Implicit, Unrolled
from prdp_fem.solvers.kinds import LINEAR, NEWTON
from prdp_fem.solvers.refined import RefinedSolver

# A star import leaves a script's names from Firedrake alone.
__all__: list[str] = []


class LinearVariationalSolver(RefinedSolver, firedrake.LinearVariationalSolver):
    """Firedrake's :class:`firedrake.LinearVariationalSolver`, with its KSP under a refinement.

    A solve is a function of the problem's coefficients and boundary values: it starts from zero,
    unless ``warm_start``, and what was solved before makes no difference. It stands on pyadjoint's
    tape as one block. The symbolic work is done once, here.

    Parameters
    ----------
    problem : LinearVariationalProblem
    refinement : Refinement or None
        Whose ``setting`` is put on the KSP at each solve; None solves as far as the options say.
    differentiation : str, Implicit or Unrolled
        ``"implicit"``: the adjoint system is solved by the same KSP with the setting of the forward
        solve. ``"unrolled"``: the exact derivative of the iterate that was computed, for the
        methods that :mod:`prdp_fem.unrolled` states again; see :class:`Unrolled`.
    warm_start : bool
        Start from the values of the solution Function instead of zero.
    ksp_prefix : str or None
        Options prefix of the KSP that follows the refinement, without that of the solver: ``""``
        for the outermost, ``"fieldsplit_1_"`` or ``"ksp_"`` for one inside the preconditioner. None
        where only one iterates.
    device : str or None
        Where systems are solved: ``"cuda"``, ``"hip"``, ``"kokkos"`` or ``"opencl"``, which PETSc
        must have been built for; ``"cpu"``; or ``"auto"`` for a device where there is one that can
        hold the operator. None is what the option ``prdp_device`` says, among ``solver_parameters``
        or in PETSc's options, or else ``"cpu"``. Forms are assembled on the host.
    **kwargs
        As Firedrake's solver takes them: ``solver_parameters``, ``options_prefix``, ``nullspace``,
        ``transpose_nullspace``, ``near_nullspace``, ``appctx``, ``pre_jacobian_callback``,
        ``post_jacobian_callback``, ``pre_function_callback``, ``ad_block_tag``.

    Attributes
    ----------
    statistics : prdp_fem.statistics.Statistics
    problem : LinearVariationalProblem
        What was passed. (Firedrake's side of the solver works on a copy whose coefficients are its
        own.)

    Notes
    -----
    There is no SNES in a linear solve: its options and monitors have no effect, the KSP's have.
    Methods that count several products as one iteration (bcgsl, ibcgs, …) may run past the budget,
    by their own way of counting.

    Firedrake's HybridizationPC and SCPC end the process ("Getri throws nonzero info") where the
    matrix of a cell is singular, as with a coefficient that is zero: give coefficients their values
    before the first solve.

    Raises
    ------
    TypeError, ValueError
        For a problem that is not linear, conditions or forms that cannot be differentiated, an
        unknown ``differentiation``, a refinement of a solver that has no iterations and is not
        direct, of one with several iterative KSPs of which none is named, and complex PETSc.

    Warns
    -----
    RuntimeWarning
        Where a direct solver has a refinement, which has no effect on it.

    Examples
    --------
    >>> refinement = ProgressiveRefinement(IterationLadder())  # doctest: +SKIP
    >>> parameters = {"ksp_type": "cg", "pc_type": "jacobi"}
    >>> solver = LinearVariationalSolver(  # doctest: +SKIP
    ...     problem, refinement=refinement, solver_parameters=parameters
    ... )
    """

    _kind = LINEAR

    def invalidate_jacobian(self) -> None:
        """Have the operator assembled again at the next solve, even if nothing it depends on seems
        to have changed.
        """
        self.system.place.clock.changed(UNSEEN)


class NonlinearVariationalSolver(RefinedSolver, firedrake.NonlinearVariationalSolver):
    """Firedrake's :class:`firedrake.NonlinearVariationalSolver`, its SNES and KSP refined.

    A setting of a linear solve (:class:`~prdp_fem.Iterations`, :class:`~prdp_fem.Tolerance`) is put
    on the KSP of each Newton step; :class:`~prdp_fem.NewtonSteps` limits the steps, too. A solve is
    a function of the problem's coefficients, boundary values and guess. It stands on pyadjoint's
    tape as one block. Implicitly it is differentiated at the state reached, by the exact derivative
    of the residual (also where steps are made with another Jacobian, as Picard's are); unrolled,
    through its Newton steps.

    Parameters
    ----------
    problem : NonlinearVariationalProblem
    refinement : Refinement or None
        Whose ``setting`` is put on SNES and KSP at each solve; None solves as far as the options
        say.
    differentiation : str, Implicit or Unrolled
        ``"implicit"``: the adjoint system is solved by the same KSP with the setting of the forward
        solve. ``"unrolled"``: the exact derivative of the iterate that was computed, for the
        methods that :mod:`prdp_fem.unrolled` states again; see :class:`Unrolled`.
    warm_start : bool
        Start from the values of the solution Function, as Firedrake does; False starts from zero.
    ksp_prefix, device
        As in :class:`LinearVariationalSolver`.
    **kwargs
        As Firedrake's solver takes them: ``solver_parameters``, ``options_prefix``, ``nullspace``,
        ``transpose_nullspace``, ``near_nullspace``, ``appctx``, ``post_jacobian_callback``,
        ``pre_apply_bcs``, ``ad_block_tag``.

    Attributes
    ----------
    statistics : prdp_fem.statistics.Statistics
    problem : NonlinearVariationalProblem
        What was passed. (Firedrake's side of the solver works on a copy whose coefficients are its
        own.)

    Raises
    ------
    TypeError, ValueError
        For a residual that UFL cannot differentiate, a variational inequality, and as
        :class:`LinearVariationalSolver`.

    Examples
    --------
    >>> linear = IterationLadder(start=4, step=4, stop=40)  # doctest: +SKIP
    >>> ladder = NewtonLadder(start=1, step=1, stop=5, linear=linear)  # doctest: +SKIP
    >>> solver = NonlinearVariationalSolver(  # doctest: +SKIP
    ...     problem,
    ...     refinement=ProgressiveRefinement(ladder),
    ...     solver_parameters={"ksp_type": "gmres", "pc_type": "jacobi"},
    ... )
    """

    _kind = NEWTON

    def __init__(
        self,
        problem: NonlinearVariationalProblem,
        *,
        refinement: Refinement | None = None,
        differentiation: str | Implicit | Unrolled = "implicit",
        warm_start: bool = True,
        ksp_prefix: str | None = None,
        device: str | None = None,
        **kwargs,
    ):
        super().__init__(
            problem,
            refinement=refinement,
            differentiation=differentiation,
            warm_start=warm_start,
            ksp_prefix=ksp_prefix,
            device=device,
            **kwargs,
        )
        if snes_facts(self.snes.getType()).is_for_inequalities:
            raise ValueError(
                f"snes_type {self.snes.getType()} solves variational inequalities, which are not"
                f" differentiable: the problem for '{problem.u.name()}' needs Firedrake's own"
                " NonlinearVariationalSolver"
            )
