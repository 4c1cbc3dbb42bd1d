"""Drop-in variational solvers whose KSP follows a refinement."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import firedrake
from firedrake import LinearVariationalProblem, NonlinearVariationalProblem
from firedrake.petsc import PETSc
from firedrake.utils import complex_mode
from pyadjoint import get_working_tape
from pyadjoint.tape import annotate_tape, stop_annotating

from prdp_fem.assembly.right_hand_side import CofunctionTerm, RightHandSide
from prdp_fem.citation import cite
from prdp_fem.krylov.factorisation import detect_null_pivots
from prdp_fem.krylov.ksp import SetByHand, set_inside_by_hand
from prdp_fem.krylov.persistence import options_of, refuse_persistent
from prdp_fem.krylov.petsc_types import pc_facts, snes_facts
from prdp_fem.krylov.snes import Newton, reset_with_linear_solver, solves_linear_systems
from prdp_fem.memory.devices import AUTO, HOST, Device, find_device
from prdp_fem.memory.memory import Memory, is_copied, memory_of
from prdp_fem.memory.place import Place
from prdp_fem.problem.assembled import AssembledForm
from prdp_fem.problem.context import coefficients_in, over_copies, users_code
from prdp_fem.problem.firedrake_internals import (
    Callbacks,
    Predecessor,
    assemble_directly,
    constructor_arguments,
    has_solved,
    operators,
    options_in_place,
    problem_of,
    share_transfers,
)
from prdp_fem.problem.forms import Forms, LinearForms, NonlinearForms
from prdp_fem.problem.inputs import local_values, set_local_values, vector_like
from prdp_fem.problem.point import Point
from prdp_fem.ranks.agreement import agree
from prdp_fem.ranks.job import end_together
from prdp_fem.ranks.threads import by_one_thread
from prdp_fem.refinement.ladders import Setting, checked_setting
from prdp_fem.refinement.option_names import check_option_names
from prdp_fem.refinement.options import refinement_from_options
from prdp_fem.refinement.rules import Refinement
from prdp_fem.solution.differentiation import Implicit, Unrolled, differentiation_of
from prdp_fem.solution.implicit import ImplicitDerivative
from prdp_fem.solution.linear import LinearSolve
from prdp_fem.solution.linearisation import Linearisation
from prdp_fem.solution.map import SolutionMap
from prdp_fem.solution.newton import NewtonSolve
from prdp_fem.solution.solver_arguments import (
    OWN,
    check_bases,
    check_names,
    check_numbers,
    check_solver_arguments,
    option_in_words,
    refinement_in_words,
)
from prdp_fem.solution.unrolled import UnrolledKrylov
from prdp_fem.solution.unrolled_newton import UnrolledNewton
from prdp_fem.statistics import Statistics
from prdp_fem.tape import SolveBlock
from prdp_fem.taped_objects import TapedMeshes

__all__ = ["RefinedSolver", "control", "refinement_from_options"]  # as that of the package

# The options that name preconditioners and nonlinear solvers, and what is known of these.
_NAMED = {
    "pc_type": ("pc_type", "pc_composite_pcs"),
    "snes_type": ("snes_type", "snes_composite_sneses"),
}
_FACTS = {"pc_type": pc_facts, "snes_type": snes_facts}


class RefinedSolver:
    """What the linear and the nonlinear solver have in common; in front of Firedrake's class among
    their bases.
    """

    _problem_type: type
    # How solves are differentiated, by the kind of differentiation.
    _derivatives: dict[type, Callable]
    # Firedrake calls these with the state at hand, and what they change is part of the problem.
    _refused_callbacks: dict[str, str]
    # What a solver has been before it came under control, while it is initialised again.
    _predecessor: Predecessor | None = None
    # What was set on its KSP by hand then.
    _set_by_hand: SetByHand | None = None

    def __init__(
        self,
        problem: NonlinearVariationalProblem,
        *,
        refinement: Refinement | None = None,
        differentiation: str | Implicit | Unrolled = "implicit",
        warm_start: bool = False,
        ksp_prefix: str | None = None,
        device: str | None = None,
        **kwargs,
    ):
        if complex_mode:
            raise ValueError(
                "this PETSc was configured for complex scalars, and prdp_fem differentiates real"
                " solves only: use an installation with real scalars"
            )
        if not isinstance(problem, NonlinearVariationalProblem):
            raise TypeError(
                f"expected a {self._problem_type.__name__}, found a {type(problem).__name__}"
            )
        given = {}

        def look() -> list[str]:
            """What ranks must have alike, where a solver can be made of what is on this one."""
            asked = refinement_in_words(refinement)
            check_solver_arguments(problem.u, type(self), warm_start, ksp_prefix, device, kwargs)
            self._differentiation = differentiation_of(differentiation)
            for name, remedy in self._refused_callbacks.items():
                if kwargs.get(name) is not None:
                    raise ValueError(f"{name} is not supported: {remedy}")
            given.update(options_of(kwargs.get("solver_parameters"), kwargs.get("options_prefix")))
            check_numbers(given, f"the solver for '{problem.u.name()}'")
            refuse_persistent(given)
            # Without the prefix: one that Firedrake has chosen need not be the same on all ranks.
            passed = [
                name
                for name, value in kwargs.items()
                if value is not None and name != "options_prefix"
            ]
            return [
                type(self).__name__,
                asked,
                f"{self._differentiation}",
                f"warm_start {bool(warm_start)}",
                f"ksp_prefix {ksp_prefix}",
                *sorted(passed),
                *(option_in_words(name, given[name]) for name in sorted(given)),
            ]

        agree(problem.u.function_space().mesh().comm, look, "arguments of a solver")
        check_bases(kwargs)
        code = users_code(given)
        # Firedrake keeps the state that it solves for in there, too: that of a solver which was
        # there before is not this one's.
        appctx = {
            key: value
            for key, value in (kwargs.get("appctx") or {}).items()
            if value is not problem.u
        }
        told, named = coefficients_in([appctx, code, kwargs.get("post_jacobian_callback")])
        forms = self._take_apart(problem, [*told, *named])
        self._callbacks = self._take_callbacks(kwargs)
        # Linear solvers, of derivatives, have states of their own, which are none of this problem.
        kwargs["appctx"] = {**over_copies(appctx, forms.copy_of), "state": forms.solution}
        try:
            super().__init__(forms.problem, **kwargs)
        except PETSc.Error as error:
            raise ValueError(
                f"PETSc refuses the solver parameters for '{problem.u.name()}': "
                f"{str(error).splitlines()[-1].partition('] ')[2]}"
            ) from None
        if self._predecessor is not None:
            self._take_over(self._predecessor)
        has_null_space = any(
            kwargs.get(name) is not None for name in ("nullspace", "transpose_nullspace")
        )
        if has_null_space:
            detect_null_pivots(self)
        assemble_directly(self)
        self.problem = problem
        self.warm_start = warm_start
        self._ksp_prefix = ksp_prefix

        self._changes_pattern = kwargs.get("post_jacobian_callback") is not None

        def make_linear_solver(problem, *, is_adjoint=False):
            options = {
                name: value
                for name, value in kwargs.items()
                if name not in ("post_jacobian_callback", "pre_apply_bcs")
            }
            if is_adjoint:
                options["nullspace"] = kwargs.get("transpose_nullspace")
                options["transpose_nullspace"] = kwargs.get("nullspace")
            solver = firedrake.LinearVariationalSolver(problem, **options)
            if has_null_space:
                detect_null_pivots(solver)
            if not solves_linear_systems(solver.snes):
                with solver.inserted_options():
                    solver.snes.getKSP().setFromOptions()
            share_transfers(self, solver)
            if self._set_by_hand is not None:
                self._set_by_hand.put_on(solver.snes.getKSP())
            assemble_directly(solver)
            return solver

        place = Place(memory_of(self._find_device(device)))
        with stop_annotating():
            forward = self._make_forward(forms, make_linear_solver, place)
        derivative = next(
            derivative
            for kind, derivative in self._derivatives.items()
            if isinstance(self._differentiation, kind)
        )
        self.system = SolutionMap(forward, derivative(forward, self._differentiation))
        self._taped_meshes = TapedMeshes(self.system.comm)
        if code or named:
            self.system.linearisation.lending.serve(named, problem.u)
        self.refinement = refinement
        self.system.collect_garbage()

    def _take_over(self, predecessor: Predecessor) -> None:
        """Go on with the SNES of the solver that there was, and with what was set on it by hand."""
        by_options, ksp = self.snes.getKSP(), predecessor.snes.getKSP()
        if predecessor.is_set_up:
            pc_type = ksp.getPC().getType()
            keeps_all = pc_facts(pc_type).is_self_contained or pc_type == PETSc.PC.Type.PYTHON
            if pc_type != by_options.getPC().getType() and not keeps_all:
                raise ValueError(
                    f"the solver's pc_type {pc_type} was set by hand, and what is inside it "
                    "would be lost with what the last solve has left there: put the "
                    "solver under control before it solves, or have solver_parameters "
                    f"say pc_type {pc_type}"
                )
        if not predecessor.snes.getUseEW():  # which changes tolerances as it goes on
            self._set_by_hand = SetByHand(ksp, by_options)
        predecessor.pass_on(self)
        if predecessor.is_set_up:
            _reset(self)
        Callbacks(self, Memory()).attach()

    @staticmethod
    @abstractmethod
    def _take_apart(problem, others: Sequence) -> Forms: ...

    @abstractmethod
    def _make_forward(
        self, forms: Forms, make_linear_solver: Callable, place: Place
    ) -> LinearSolve | NewtonSolve: ...

    @staticmethod
    def _take_callbacks(kwargs: dict) -> list[Callable]:
        """Callbacks to be run before a solve, taken out of the keyword arguments."""
        return []

    @property
    def _problem(self):
        """What Firedrake's own ``solve`` looks for first, and nobody else does.

        Kept from before a solver came under control, it would solve for what is not the user's.
        """
        raise RuntimeError(
            f"this is the solve() that the solver for '{self.problem.u.name()}' had before it came "
            "under control, which would leave the solution as it is: call solver.solve() of now"
        )

    @property
    def refinement(self) -> Refinement | None:
        """Whose setting is put on the KSP at each solve; it can be exchanged between solves."""
        return self._refinement

    @refinement.setter
    def refinement(self, refinement: Refinement | None) -> None:
        agree(
            self.system.comm,
            lambda: refinement_in_words(refinement),
            "refinements of a solver",
            "give them comm=, and have all ranks step and set them alike",
        )
        if refinement is not None:
            self.system.check_setting(checked_setting(refinement.setting))
            cite()
        self._refinement = refinement

    @property
    def differentiation(self) -> Implicit | Unrolled:
        """How solves are differentiated; chosen when the solver is made."""
        return self._differentiation

    @property
    def device(self) -> str:
        """Where solves are made: ``"cpu"``, ``"cuda"``, ``"hip"``, ``"kokkos"`` or ``"opencl"``."""
        return self.system.memory.name

    def to(self, device: str) -> RefinedSolver:
        """Make solves on another device from now on, or on the host again.

        Parameters
        ----------
        device : str
            As in the constructor.

        Returns
        -------
        RefinedSolver
            This solver.

        Raises
        ------
        ValueError
            For a device that is not there, or that cannot hold the operator. Nothing has changed
            then.
        """
        found = self._find_device(device)
        if found != self.system.memory.device:
            self.system.move_to(memory_of(found))
        return self

    def _find_device(self, name: str | None) -> Device | None:
        """The device of a name; None for what PETSc's options say."""
        comm = self.problem.u.function_space().mesh().comm
        if name is None:
            agree(comm, check_option_names, "options")
            default = self.parameters.get(
                "prdp_device", PETSc.Options().getString("prdp_device", HOST)
            )
            name = PETSc.Options(self.options_prefix).getString("prdp_device", default)
        device = find_device(name, comm)
        obstacle = None if device is None else self._obstacle_to_devices()
        if obstacle is None:
            return device
        if name == AUTO:
            return None
        raise ValueError(
            f"the solver for '{self.problem.u.name()}' cannot be on device '{name}': {obstacle}, or"
            " device='cpu'"
        )

    def _obstacle_to_devices(self) -> str | None:
        """What of the solver must be on the host, and what to use instead; None for nothing."""
        if self._changes_pattern:
            return (
                "its post_jacobian_callback may give the matrix entries in other places, leave it"
                " away"
            )
        for operator in operators(self):
            if not is_copied(operator):
                return f"its operator is of type {operator.getType()}, use mat_type aij"
        own = {"pc_type": self.snes.getKSP().getPC().getType(), "snes_type": self.snes.getType()}
        for option, facts in _FACTS.items():
            named = (
                value for name, value in self.parameters.items() if name.endswith(_NAMED[option])
            )
            for kinds in (own[option], *named):
                if kinds is not None and any(
                    facts(kind).works_on_host for kind in str(kinds).split(",")
                ):
                    return (
                        f"{option} {kinds} has vectors go through Firedrake, which is on the "
                        "host, use another one of PETSc's"
                    )
        return None

    @property
    def statistics(self) -> Statistics:
        """What the solver has done: solves, iterations and seconds, forward and adjoint."""
        return self.system.statistics

    @property
    def setting(self) -> Setting | None:
        """What the next solve puts on the KSP."""
        refinement = self._refinement
        # Settings of a user's class can have changed since they were looked at.
        return None if refinement is None else checked_setting(refinement.setting)

    def get_solution(self) -> firedrake.Function:
        """The user's solution Function."""
        return self.problem.u

    @by_one_thread("system")
    def solve(self, bounds=None, **kwargs) -> firedrake.Function:
        """Solve with the setting of the moment, and annotate the solve on the working tape.

        Parameters
        ----------
        bounds
            Not supported: variational inequalities are not differentiable.
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
            On NaN, breakdown or divergence, and where a tolerance is not reached. The solution is
            left as it was, and nothing is put on the tape.
        ValueError
            Where ranks have come to different settings, on all of them.
        """
        if bounds is not None:
            raise ValueError(
                f"the problem for '{self.problem.u.name()}' with bounds is a variational"
                " inequality, and not differentiable: solve it with Firedrake's"
                " NonlinearVariationalSolver"
            )
        annotate = annotate_tape(kwargs)
        tag = kwargs.pop("ad_block_tag", self.ad_block_tag)
        if kwargs:
            raise TypeError(
                f"solve() takes bounds, annotate and ad_block_tag, found {', '.join(kwargs)}"
            )
        u, setting = self.problem.u, self.system.agreed_setting(self._refinement)
        with stop_annotating():
            point = self.point()
            solution = local_values(u)
            (record,) = self.system.solve(point, setting, solution[None])
        if annotate:
            block = SolveBlock(
                self.system,
                self._taped_meshes,
                self.problem,
                self.refinement,
                record,
                warm_start=self.warm_start,
                ad_block_tag=tag,
            )
            get_working_tape().add_block(block)
        with stop_annotating():
            set_local_values(u, solution)
        if annotate:
            block.add_output(u.create_block_variable())
        self.system.collect_garbage()
        return u

    def point(self, without: Sequence[int] = (), *, has_boundary: bool = True) -> Point:
        """Where the next solve is made: the present values of the user's coefficients, boundary
        values and guess.

        Parameters
        ----------
        without : sequence of int
            Inputs whose values are not read, because the caller puts in its own.
        has_boundary : bool
            Whether boundary values are read; False where the caller puts in its own, too.

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
        present = self.system.present
        return Point(
            present.inputs(without),
            present.boundary(self.problem.bcs) if has_boundary else None,
            local_values(self.problem.u) if self.warm_start else None,
        )


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
        unknown ``differentiation``, a direct solver under a refinement, one with several iterative
        KSPs of which none is named, and complex PETSc.

    Examples
    --------
    >>> refinement = ProgressiveRefinement(IterationLadder())  # doctest: +SKIP
    >>> parameters = {"ksp_type": "cg", "pc_type": "jacobi"}
    >>> solver = LinearVariationalSolver(  # doctest: +SKIP
    ...     problem, refinement=refinement, solver_parameters=parameters
    ... )
    """

    _problem_type = LinearVariationalProblem
    _derivatives = {Implicit: ImplicitDerivative, Unrolled: UnrolledKrylov}
    _take_apart = staticmethod(LinearForms)
    _refused_callbacks = dict.fromkeys(
        ("post_function_callback", "marking_callback"),
        "a linear solve assembles no residual; put what it adds into the right-hand side, as a"
        " Cofunction",
    )

    def _make_forward(
        self, forms: LinearForms, make_linear_solver: Callable, place: Place
    ) -> LinearSolve:
        right_hand_side = RightHandSide(forms, place)
        linearisation = Linearisation(
            forms,
            self,
            make_linear_solver,
            self._ksp_prefix,
            place,
            unassembled=right_hand_side.terms.keys(),
        )
        return LinearSolve(linearisation, right_hand_side)

    @staticmethod
    def _take_callbacks(kwargs: dict) -> list[Callable]:
        return [
            callback
            for name in ("pre_function_callback", "pre_jacobian_callback")
            if (callback := kwargs.pop(name, None)) is not None
        ]

    def invalidate_jacobian(self) -> None:
        """Have the operator assembled again at the next solve, even if nothing it depends on seems
        to have changed.
        """
        self.system.invalidate()


class NonlinearVariationalSolver(RefinedSolver, firedrake.NonlinearVariationalSolver):
    """Firedrake's :class:`firedrake.NonlinearVariationalSolver`, with its SNES and KSP under a
    refinement.

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

    _problem_type = NonlinearVariationalProblem
    _derivatives = {Implicit: ImplicitDerivative, Unrolled: UnrolledNewton}
    _take_apart = staticmethod(NonlinearForms)
    _refused_callbacks = dict.fromkeys(
        (
            "pre_function_callback",
            "post_function_callback",
            "pre_jacobian_callback",
            "marking_callback",
        ),
        "what it changes during a solve is no part of the residual that is differentiated; state it"
        " in the forms",
    )

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

    def _make_forward(
        self, forms: NonlinearForms, make_linear_solver: Callable, place: Place
    ) -> NewtonSolve:
        terms = {
            forms.inputs.index(entry): CofunctionTerm(weight, forms, place)
            for entry, weight in forms.cofunctions.items()
        }
        newton = Newton(self.snes, forms.solution.name(), self._ksp_prefix)
        # The residual is assembled from all inputs, Cofunctions too.
        linearisation = Linearisation(
            forms,
            make_linear_solver(forms.linearised_problem()),
            make_linear_solver,
            self._ksp_prefix,
            place,
            newton=newton,
        )
        return NewtonSolve(linearisation, terms, self, newton)


class _LinearSolver(firedrake.LinearSolver, LinearVariationalSolver):
    """Firedrake's solver of assembled systems, under control: it solves by the other class."""

    # Of A, and of P where that is another one.
    _assembled: list[AssembledForm]

    def solve(self, x: firedrake.Function, b: firedrake.Cofunction) -> None:
        """Solve A x = b, with A as it was assembled last.

        Parameters
        ----------
        x : Function
        b : Cofunction

        Raises
        ------
        ValueError
            Where A was changed otherwise than by assembling its form, or coefficients since then.
        firedrake.exceptions.ConvergenceError
            As :meth:`RefinedSolver.solve`.
        """
        for assembled in self._assembled:
            assembled.follow()
        if annotate_tape():
            for assembled in self._assembled:
                assembled.record()
        super().solve(x, b)


_CONTROLLED = {
    firedrake.LinearVariationalSolver: LinearVariationalSolver,
    firedrake.NonlinearVariationalSolver: NonlinearVariationalSolver,
    firedrake.LinearSolver: _LinearSolver,
}


def control(solver, refinement: Refinement | None, **options):
    """Put a solver that is already there under a refinement.

    The solver stays the object that it is, with its SNES and KSP and what was set on them by hand,
    but becomes one of this package: its solves, and all that its blocks on the tape do from now on
    (replay, adjoint, tangent linear, Hessian), follow the refinement, start from zero and do not
    depend on what was solved before. Solves that are on a tape already stay as they were.

    Inside the preconditioner is what the options say that the solver was made with. What was
    changed there by hand stays where the solver has not solved yet; after a solve, preconditioners
    that have parts are made anew from the options, and types and tolerances that were changed by
    hand are an error that names the option to be used.

    A LinearSolver solves with its matrices as they were assembled last, so that
    ``assemble(a, bcs=bcs, tensor=A)`` between solves is seen, and is differentiated by the
    coefficients of their forms, at the values that they had then.

    Parameters
    ----------
    solver : firedrake.LinearVariationalSolver, firedrake.NonlinearVariationalSolver or
    firedrake.LinearSolver
        Or a solver of this package, whose refinement is exchanged. Several solvers may share one
        refinement.
    refinement : Refinement or None
    **options
        ``differentiation``, ``warm_start``, ``ksp_prefix`` and ``device``, see
        :class:`LinearVariationalSolver`.

    Returns
    -------
    solver
        The same object.

    Raises
    ------
    TypeError, ValueError
        For another object, for a matrix that is not what its form gives, for what was changed
        inside the preconditioner by hand and would be lost, and for what the solvers of this
        package refuse; on all ranks, where it is so on one. The solver is left as it was.

    Examples
    --------
    >>> prdp_fem.control(solver, ProgressiveRefinement(IterationLadder(start=2)))  # doctest: +SKIP
    """
    is_refined = isinstance(solver, RefinedSolver)
    if not is_refined and type(solver) not in _CONTROLLED:
        raise TypeError(
            "expected a Firedrake LinearVariationalSolver, NonlinearVariationalSolver or"
            f" LinearSolver, found a {type(solver).__module__}.{type(solver).__qualname__}"
        )

    def look() -> list[str]:
        """What ranks must have alike, where it makes sense on this one."""
        check_names(options, OWN, "control()")
        if is_refined:
            _check_made_so(solver, options)
        return [type(solver).__name__, refinement_in_words(refinement), *sorted(options)]

    agree(solver.snes.comm.tompi4py(), look, "arguments of control()")
    if is_refined:
        solver.refinement = refinement
        device = options.get("device")
        return solver if device is None else solver.to(device)
    if has_solved(solver):
        _refuse_to_lose(solver)
    arguments, assembled = {**constructor_arguments(solver), **options}, []
    if isinstance(solver, firedrake.LinearSolver):
        problem, assembled = _assembled_problem(solver, arguments)
    else:
        problem = problem_of(solver)
    predecessor = Predecessor(solver)
    solver.__class__ = _CONTROLLED[type(solver)]
    try:
        solver._predecessor, solver._assembled = predecessor, assembled
        is_nonlinear = isinstance(solver, NonlinearVariationalSolver)
        refined_type = NonlinearVariationalSolver if is_nonlinear else LinearVariationalSolver
        refined_type.__init__(solver, problem, refinement=refinement, **arguments)
    except BaseException:
        predecessor.restore(solver)
        if predecessor.has_passed_on:
            _reset(solver)
        raise
    del solver._predecessor
    return solver


def _refuse_to_lose(solver) -> None:
    """Raise a ValueError where what was set by hand inside the preconditioner would be lost."""
    with options_in_place(solver):
        found = set_inside_by_hand(solver.snes.getKSP())

    def look() -> None:
        if found is not None:
            raise ValueError(
                f"inside the solver's preconditioner {found} was set by hand, and would "
                "be lost with what the last solve has left there: have "
                "solver_parameters say it"
            )

    # Blocks of a preconditioner may be each on one rank.
    agree(solver.snes.comm.tompi4py(), look, "preconditioners")


def _check_made_so(solver: RefinedSolver, options: Mapping[str, Any]) -> None:
    """Raise a ValueError where a solver is to have been made otherwise than it was."""
    for name, value in options.items():
        value = differentiation_of(value) if name == "differentiation" else value
        is_kept = name in ("differentiation", "warm_start") and value == getattr(solver, name)
        if not is_kept and name != "device":
            raise ValueError(
                f"the solver is one of prdp_fem already, whose {name} is chosen when it is made"
            )


def _reset(solver) -> None:
    """Have SNES, KSP and preconditioner set up anew at the next solve, for its operators."""
    with options_in_place(solver):
        reset_with_linear_solver(solver.snes)


def _assembled_problem(solver: firedrake.LinearSolver, arguments: dict) -> tuple:
    """The problem that an assembled system states, and the forms of its matrices."""
    A, P = solver.A, solver.P
    parameters = A.form_compiler_parameters
    kinds = ("nullspace", "transpose_nullspace", "near_nullspace")
    null_spaces = [name for name in kinds if arguments.get(name) is not None]
    assembled = [
        AssembledForm(matrix, A.bcs, parameters, null_spaces)
        for matrix in ([A] if P is A else [A, P])
    ]
    problem = LinearVariationalProblem(
        assembled[0].form,
        solver.b,
        solver.x,
        bcs=A.bcs,
        aP=None if P is A else assembled[1].form,
        form_compiler_parameters=parameters,
    )
    return problem, assembled


# Importing Firedrake is collective, too.
end_together()
