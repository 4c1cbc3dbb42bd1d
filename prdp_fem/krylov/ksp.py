"""A setting put on a PETSc KSP, or on one inside its preconditioner.

And what counts as failure of its solves, and how many iterations they have spent.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Container, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from mpi4py import MPI

from prdp_fem.krylov import nested
from prdp_fem.krylov.null_spaces import null_space
from prdp_fem.krylov.petsc_errors import cause_of, remedy
from prdp_fem.krylov.petsc_types import ksp_facts, pc_facts
from prdp_fem.krylov.post_solve import PostSolve
from prdp_fem.ranks.warning import OneWarning
from prdp_fem.refinement.ladders import Setting, is_frozen

__all__ = [
    "RefinedKSP",
    "SetByHand",
    "abandon_preconditioner",
    "forget_zero_pivots",
    "in_a_sentence",
    "lift_bounds",
    "reason_names",
    "renew_preconditioner",
    "reset",
    "set_inside_by_hand",
    "set_up",
]

_NOTHING_TO_REFINE = (
    "the solver for '{}' is direct, and there is nothing to refine: it solves as far as it can at "
    "each level"
)
_NEVER = 1e300
# Another one than any, None included.
_NO_SETTING = object()
# The options of what a KSP gives as its tolerances.
_TOLERANCES = ("ksp_rtol", "ksp_atol", "ksp_divtol", "ksp_max_it")
# PETSc's own ksp_atol, which stops nothing.
_NO_ATOL = 1e-50
# Below it, a relative tolerance is none: an absolute one is to decide.
_NO_RTOL = sys.float_info.epsilon
# The relative tolerance then, where the absolute one is not meant: what is below would only stir
# rounding errors.
_FLOOR = 1e-12
# petsc4py has no name for what is called of it.
_LIBRARY = ctypes.CDLL(PETSc.__file__)


def reason_names(reasons: type) -> dict[int, str]:
    """The names of the converged reasons of a PETSc class, by their values."""
    return {
        value: name
        for name, value in vars(reasons).items()
        if not name.startswith("_") and isinstance(value, int)
    }


_REASONS = reason_names(PETSc.KSP.ConvergedReason)
_USED_UP = PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT
# After a number of iterations, without a look at the residual or whatever it is.
_BY_NUMBER = PETSc.KSP.ConvergedReason.CONVERGED_ITS
# Where a method stops at the edge of a region that it trusts, and calls that convergence.
_STOPPED_SHORT = (
    PETSc.KSP.ConvergedReason.CONVERGED_NEG_CURVE,
    PETSc.KSP.ConvergedReason.CONVERGED_STEP_LENGTH,
)
# What says that a KSP has a solution, where options alone have asked for it.
_GOOD = frozenset(reason for reason in _REASONS if reason >= 0).difference(_STOPPED_SHORT)
_REMEDIES = {
    "DIVERGED_MAX_IT": (
        "allow more iterations (ksp_max_it, or max_it of a tolerance ladder), a looser tolerance "
        "or a stronger pc_type"
    ),
    "DIVERGED_DTOL": (
        "the iteration does not converge for this operator: try another ksp_type or pc_type, or "
        "damp it (ksp_richardson_scale)"
    ),
    "DIVERGED_NANORINF": (
        "look for NaN or infinity in the controls and coefficients, or for an operator that is "
        "singular"
    ),
    "DIVERGED_INDEFINITE_MAT": (
        "the operator is not positive definite: use ksp_type minres or gmres"
    ),
    "CONVERGED_ITS": "which says nothing of the tolerance: allow more iterations (max_it of a "
    "tolerance ladder), leave away what looks at no residual (ksp_norm_type none, "
    "ksp_convergence_test skip, pc_type sor with ksp_type richardson), or ask for iterations, as "
    "by an IterationLadder",
    "CONVERGED_NEG_CURVE": "which is no solution, since the operator is not positive definite: "
    "use ksp_type minres or gmres",
    "CONVERGED_STEP_LENGTH": "which is no solution, since that is larger than the method was "
    "allowed to make it: take its radius away (ksp_minres_radius, ksp_cg_radius)",
    "DIVERGED_INDEFINITE_PC": (
        "the preconditioner is not positive definite: use another pc_type, or ksp_type gmres"
    ),
    "DIVERGED_PCSETUP_FAILED": (
        "the preconditioner could not be set up: the operator may be singular, or need another "
        "pc_type"
    ),
}

# What a preconditioner that could not be set up may have noted, which is another matter.
_NO_ROOM = (
    "the factorisation needs more room than was estimated: allow for more "
    "(mat_mumps_icntl_14 200, of MUMPS), or use another pc_type"
)


def lift_bounds(solver) -> None:
    """Have MINRES make solutions of any size, where options name none.

    PETSc's own bound is 6.7e7, in the norm of the preconditioner, whatever the units.

    Parameters
    ----------
    solver : petsctools.OptionsManager
        One of Firedrake's, with a SNES.
    """
    minres = PETSc.KSP.Type.MINRES
    for option, value in list(solver.parameters.items()):
        if option.endswith("ksp_type") and value == minres:
            solver.set_default_parameter(option.removesuffix("type") + "minres_radius", _NEVER)
    # Of what there is already, options have been read.
    outer = solver.snes.getKSP()
    for ksp in nested.all_inside(outer):
        if ksp.getType() == minres:
            prefix = (ksp.getOptionsPrefix() or "").removeprefix(outer.getOptionsPrefix() or "")
            radius = float(solver.parameters.get(f"{prefix}ksp_minres_radius", _NEVER))
            _LIBRARY.KSPMINRESSetRadius(ctypes.c_void_p(ksp.handle), ctypes.c_double(radius))


def in_a_sentence(error: PETSc.Error, what: str) -> BaseException:
    """What to raise for an error of PETSc's: what Python raised inside, where it is from there."""
    cause = cause_of(error)
    if not isinstance(cause, PETSc.Error):
        return cause
    return ConvergenceError(f"{what}: {remedy(cause)}")


def renew_preconditioner(ksp: PETSc.KSP) -> None:
    """Put a new preconditioner, of the same options, in the place of the one there is.

    Inside its solver's context.
    """
    operators = ksp.getOperators()
    _exchange_preconditioner(ksp)
    ksp.setOperators(*operators)


def _exchange_preconditioner(ksp: PETSc.KSP) -> None:
    last = ksp.getPC()
    pc = _like(last)
    ksp.setPC(pc)
    # Not the KSP, on which more may have been set by hand.
    pc.setFromOptions()
    if last.getType() in (None, pc.getType()):
        return  # None where it was never asked for, as by a SNES without linear solves
    # The type was set by hand, and so was the object of Python that is one.
    if last.getType() == PETSc.PC.Type.PYTHON:
        ksp.setPC(last)
    else:
        pc.setType(last.getType())


def _like(last: PETSc.PC) -> PETSc.PC:
    """A new preconditioner that will read the same options."""
    pc = PETSc.PC().create(last.comm)
    pc.setOptionsPrefix(last.getOptionsPrefix())
    pc.setDM(last.getDM())
    return pc


def set_inside_by_hand(ksp: PETSc.KSP) -> str | None:
    """What was set by hand inside the preconditioner of a KSP; inside its solver's context.

    Types, and tolerances of KSPs, are compared with those of another preconditioner, which is set
    up for the same operators by the same options.

    Returns
    -------
    str or None
        The first that is another one than options say; None where all are the same.
    """
    last = ksp.getPC()
    if pc_facts(last.getType()).is_self_contained:
        return None
    by_options = _like(last)
    by_options.setFromOptions()
    if by_options.getType() != last.getType():
        return None  # a preconditioner that was set by hand as a whole
    by_options.setOperators(*last.getOperators())
    try:
        by_options.setUp()
        by_options.setUpOnBlocks()
        nested.set_up_inside(by_options)
    except PETSc.Error:
        by_options.incRef()  # never destroyed, as in abandon_preconditioner
        return None
    return next(_differences(last, by_options, last.getOptionsPrefix() or ""), None)


def _differences(pc: PETSc.PC, by_options: PETSc.PC, outer: str) -> Iterator[str]:
    """What differs inside a preconditioner, outermost first, as far as both are set up."""
    for part, other in zip(nested.parts(pc), nested.parts(by_options)):
        prefix = (part.getOptionsPrefix() or "").removeprefix(outer)
        if isinstance(part, PETSc.KSP):
            yield from _difference(f"{prefix}ksp_type", part.getType(), other.getType())
            for name, mine, theirs in zip(_TOLERANCES, part.getTolerances(), other.getTolerances()):
                yield from _difference(f"{prefix}{name}", mine, theirs)
            part, other = part.getPC(), other.getPC()
        if part.getType() == other.getType():
            yield from _differences(part, other, outer)
        else:
            yield from _difference(f"{prefix}pc_type", part.getType(), other.getType())


def _difference(option: str, found, by_options) -> Iterator[str]:
    if found != by_options:
        yield f"{option} {found} (options say {by_options})"


def forget_zero_pivots(ksp: PETSc.KSP) -> None:
    """Forget those that PETSc has noted on preconditioners and matrices.

    They would stay there, whatever values these get.
    """
    for pc in nested.all_preconditioners(ksp):
        pc.setFailedReason(PETSc.PC.FailedReason.NOERROR)
        for matrix in pc.getOperators():
            _LIBRARY.MatFactorClearError(ctypes.c_void_p(matrix.handle))
            if matrix.getType() in ("mpiaij", "mpibaij"):
                diagonal_block = matrix.getDiagonalBlock()
                _LIBRARY.MatFactorClearError(ctypes.c_void_p(diagonal_block.handle))


def reset(ksp: PETSc.KSP) -> None:
    """Have vectors and preconditioner made anew when a KSP is set up again.

    Inside its solver's context.
    """
    forget_zero_pivots(ksp)
    ksp.reset()
    if ksp.getType() == PETSc.KSP.Type.IDR:
        _start_random_numbers(ksp)
    pc = ksp.getPC()
    kind = pc.getType()
    if pc_facts(kind).is_self_contained:
        # A reset takes from factorisations what options say of them; a type that was set by hand
        # has none, and would give way to theirs.
        if PETSc.Options(pc.getOptionsPrefix()).getString("pc_type", kind) == kind:
            pc.setFromOptions()
    elif kind is not None:  # as it is where a SNES solves no linear systems
        # What is inside is not made anew by itself.
        _exchange_preconditioner(ksp)


def _start_random_numbers(ksp: PETSc.KSP) -> None:
    """Have IDR(s) draw the shadow space of a new KSP when it draws it anew."""
    random = ctypes.c_void_p()
    _LIBRARY.KSPIDRGetRandom(ctypes.c_void_p(ksp.handle), ctypes.byref(random))
    _LIBRARY.PetscRandomSeed(random)


class SetByHand:
    """What was set on a KSP by hand, to be set on others of the same options.

    Parameters
    ----------
    ksp : PETSc.KSP
    by_options : PETSc.KSP
        One on which nothing else was set than the same options say.
    """

    def __init__(self, ksp: PETSc.KSP, by_options: PETSc.KSP):
        pcs = ksp.getPC(), by_options.getPC()
        self._type, self._pc_type = (
            None if one.getType() == other.getType() else one.getType()
            for one, other in ((ksp, by_options), pcs)
        )
        if self._pc_type == PETSc.PC.Type.PYTHON:
            self._pc_type = None  # the object of Python that it is belongs to one KSP
        tolerances = ksp.getTolerances(), by_options.getTolerances()
        self._tolerances = None if tolerances[0] == tolerances[1] else tolerances[0]

    def put_on(self, ksp: PETSc.KSP) -> None:
        """Set it on another KSP that is not set up."""
        if self._type is not None:
            ksp.setType(self._type)
        if self._pc_type is not None:
            ksp.getPC().setType(self._pc_type)
        if self._tolerances is not None:
            ksp.setTolerances(*self._tolerances)


def abandon_preconditioner(ksp: PETSc.KSP) -> None:
    """Put a new one in the place of a preconditioner that an error of PETSc's has left half-way.

    What is left is never destroyed, nor reset: some, such as multigrid, would destroy vectors and
    matrices that are not theirs. The KSP is to be reset before its next use.
    """
    forget_zero_pivots(ksp)
    ksp.getPC().incRef()
    _exchange_preconditioner(ksp)


def set_up(ksp: PETSc.KSP, A: PETSc.Mat, P: PETSc.Mat, name: str) -> None:
    """Set a KSP up for the present values of its operators, whatever it was set up for before.

    Inside its solver's context.

    Raises
    ------
    firedrake.exceptions.ConvergenceError
        Where the preconditioner refuses them; the KSP is to be reset before its next use.
    """
    if nested.has_memory_inside(ksp):
        # To reset one that remembers is not enough, since smoothers estimate eigenvalues from what
        # they had.
        renew_preconditioner(ksp)
    ksp.setOperators(A, P)
    try:
        ksp.setUp()
        ksp.setUpOnBlocks()
    except PETSc.Error as error:
        abandon_preconditioner(ksp)
        said = in_a_sentence(
            error,
            f"the preconditioner for '{name}' (pc_type "
            f"{ksp.getPC().getType()}) could not be set up",
        )
        raise said from said.__cause__


class _AsOptionsSay(NamedTuple):
    """What options had said of a KSP, which is kept from being let go of."""

    ksp: PETSc.KSP
    tolerances: tuple[float, float, float, int]
    error_if_not_converged: bool
    norm: int


class _Overrides:
    """What options have said of KSPs, while something else is put on them."""

    def __init__(self):
        self._said: dict[int, _AsOptionsSay] = {}

    def keep(self, handles: Container[int]) -> None:
        """Forget all KSPs but those with some handles."""
        self._said = {handle: said for handle, said in self._said.items() if handle in handles}

    def put(self, ksp: PETSc.KSP, setting: Setting | None, guess: bool, is_absolute: bool) -> None:
        """Put a setting on a KSP; see :meth:`RefinedKSP.apply`."""
        if setting is None and not guess and (is_absolute or self.atol(ksp) <= _NO_ATOL):
            self._put_back(ksp)
            return
        if ksp.handle not in self._said:
            self._said[ksp.handle] = _AsOptionsSay(
                ksp, ksp.getTolerances(), ksp.getErrorIfNotConverged(), ksp.getNormType()
            )
        # A setting may leave the first and the last to the KSP, by None.
        rtol: float | None
        max_it: int | None
        _, (rtol, atol, divtol, max_it), error_if_not_converged, norm = self._said[ksp.handle]
        if setting is not None:
            rtol = setting.rtol
            max_it = setting.max_it
            # PETSc would take a used-up budget for an error; what is one is decided in
            # checked_iterations.
            error_if_not_converged = False
            is_free = ksp_facts(ksp.getType()).has_free_natural_norm
            if setting.budget and is_free and norm == PETSc.KSP.NormType.PRECONDITIONED:
                # For a budget any norm will do to see the floor and NaN by.
                norm = PETSc.KSP.NormType.NATURAL
        if ksp.getNormType() != norm:
            ksp.setNormType(norm)
        if guess:
            # It is relative to the right-hand side, of which a guess may be any multiple away.
            divtol = _NEVER
        if not is_absolute and atol > _NO_ATOL:
            if setting is None and rtol is not None and rtol < _NO_RTOL:
                rtol = _FLOOR
            atol = _NO_ATOL
        ksp.setTolerances(rtol=rtol, atol=atol, divtol=divtol, max_it=max_it)
        ksp.setErrorIfNotConverged(error_if_not_converged)

    def _put_back(self, ksp: PETSc.KSP) -> None:
        """Have a KSP as options say, where something else was put on it."""
        if ksp.handle in self._said:
            said = self._said.pop(ksp.handle)
            rtol, atol, divtol, max_it = said.tolerances
            ksp.setTolerances(rtol=rtol, atol=atol, divtol=divtol, max_it=max_it)
            ksp.setErrorIfNotConverged(said.error_if_not_converged)
            ksp.setNormType(said.norm)

    def atol(self, ksp: PETSc.KSP) -> float:
        """The absolute tolerance that options say."""
        said = self._said.get(ksp.handle)
        return (ksp.getTolerances() if said is None else said.tolerances)[1]


class RefinedKSP:
    """A KSP with the one that settings are put on: itself, or one inside its preconditioner.

    Parameters
    ----------
    ksp : PETSc.KSP
        It has its operators and options.
    name : str
        The name of what is solved for, for messages.
    prefix : str or None
        The options prefix of the KSP that settings are put on; None for the only iterative one.
    in_snes : bool
        Whether a SNES calls its solves.

    Attributes
    ----------
    nothing_to_refine : OneWarning
        What warns of a direct solver; it may be exchanged for that of another one of this class.
    """

    def __init__(self, ksp: PETSc.KSP, name: str, prefix: str | None, *, in_snes: bool = False):
        self.ksp = ksp
        self.name = name
        self._prefix = prefix
        self._in_snes = in_snes
        self._refined: PETSc.KSP | None = None
        self._is_direct = False
        self.nothing_to_refine = OneWarning()
        # What options had said of KSPs, before something else was put on them.
        self._overrides = _Overrides()
        # What was put on the KSP last, and the tolerances that it then had: most solves ask for the
        # same again. That nothing absolute stops a solve is the same as its opposite where there is
        # no absolute tolerance.
        self._setting: Any = _NO_SETTING
        self._asked: tuple | None = None
        self._left: tuple | None = None
        # Those of KSP and preconditioner at the last solve.
        self._types: tuple | None = None
        self._are_types_kept = False
        self._ignores_absolute = False
        # The others beside the one that settings are put on; None where they are to be looked for.
        self._others: list[PETSc.KSP] | None = None
        self._is_budget = False
        self._hidden = _HiddenSolves()

    @property
    def is_found(self) -> bool:
        """Whether it is known which KSP settings are put on, without anything set up."""
        return self._refined is not None or self._is_direct

    def find(self) -> None:
        """Find the KSP that settings are put on.

        The preconditioner is set up by then, where one may be inside. There is none in a direct
        solver, on which no setting has an effect, as a warning says once.
        """
        if self._prefix is None and nested.solves_directly(self.ksp):
            self._is_direct = True
            self.nothing_to_refine.give(_NOTHING_TO_REFINE.format(self.name), self.ksp.comm)
            return
        refined = self._look_inside()
        if refined.handle == self.ksp.handle:
            refined = self.ksp
        self._refined = refined
        self._others = None
        self._asked = None
        if self._is_hidden:
            self._hidden.watch(refined)

    def _look_inside(self) -> PETSc.KSP:
        try:
            return nested.find_iterative(self.ksp, self._prefix)
        except ValueError:
            if not nested.needs_set_up(self.ksp, self._prefix) or not self._set_up_inside():
                raise
        return nested.find_iterative(self.ksp, self._prefix)

    def _set_up_inside(self) -> bool:
        """Whether there may be more inside the preconditioner than there was."""
        try:
            return nested.set_up_inside(self.ksp.getPC())
        except PETSc.Error:
            return False  # the first solve will say what is wrong

    def find_without_setup(self) -> None:
        """Find it where that takes no preconditioner that is set up."""
        if not nested.needs_set_up(self.ksp, self._prefix):
            self.find()

    def set_up(self) -> None:
        """To be called where the preconditioner was set up anew: KSPs inside may be others now."""
        if nested.is_self_contained(self.ksp):
            return
        if self.is_nested:
            self.find()
        self._others = None

    @cached_property
    def may_have_thresholds(self) -> bool:
        """Whether something in it may look at absolute sizes, whatever tolerances say.

        Not all that is inside a preconditioner can be told.
        """
        has_thresholds = ksp_facts(self.ksp.getType()).has_thresholds
        return has_thresholds or not nested.is_self_contained(self.ksp)

    @property
    def is_budget(self) -> bool:
        """Whether a budget of iterations is on the KSP."""
        return self._is_budget

    @property
    def good_reasons(self) -> frozenset[int]:
        """The converged reasons by which a solve of the KSP has done what it was asked for."""
        return _GOOD if self.is_nested else self._hidden.good

    @property
    def is_nested(self) -> bool:
        """Whether settings are put on a KSP inside the preconditioner."""
        return self._refined is not None and self._refined is not self.ksp

    @property
    def _is_hidden(self) -> bool:
        """Whether solves of the KSP that settings are put on are called by others."""
        return self._refined is not None and (self._in_snes or self._refined is not self.ksp)

    def apply(self, setting: Setting | None, guess: bool, *, is_absolute: bool = True) -> bool:
        """Put a setting on the KSP; None, or a setting of None, for what its options say.

        Parameters
        ----------
        setting : Setting or None
        guess : bool
            Whether solves start from what is in the solution vector.
        is_absolute : bool
            Whether the absolute tolerances that options say, of all KSPs, are meant for such
            right-hand sides; else nothing absolute stops a solve.

        Returns
        -------
        bool
            Whether something was changed: not where the last solve has left it as it is to be.
        """
        ksp = self.ksp
        types = ksp.getType(), ksp.getPC().getType()
        # A direct solver has no use for a guess, and PETSc refuses to give it one.
        guess = guess and not ksp_facts(types[0]).only_applies_preconditioner
        # It may have been set by hand since, or by somebody who has the same KSP.
        ksp.setInitialGuessNonzero(guess)
        self._hidden.begin()
        if self._is_hidden:
            self._hidden.watch(self._refined)
        # Tolerances of another KSP, inside, are looked at below.
        asked = types, guess, self._ignores_absolute or is_absolute
        if setting is self._setting and asked == self._asked and ksp.getTolerances() == self._left:
            return False
        if types != self._types:
            self._forget_types(types)
        is_kept = setting is None or is_frozen(setting)
        self._setting = setting if is_kept else _NO_SETTING
        if setting is not None and setting.max_it is None:
            setting = None
        if setting is not None and not self.is_found:
            self.find()
        if self._is_direct:
            setting = None
        self._is_budget = setting is not None and bool(setting.budget)
        self._hidden.good = _good_for(setting)
        refined = ksp if self._refined is None else self._refined
        beside = self._beside(refined)
        for other in beside:
            self._overrides.put(other, None, guess and other is ksp, is_absolute)
        self._overrides.put(refined, setting, guess and refined is ksp, is_absolute)
        is_alone = not beside and refined is ksp
        self._ignores_absolute = is_alone and self._overrides.atol(ksp) <= _NO_ATOL
        self._asked = types, guess, self._ignores_absolute or is_absolute
        self._left = ksp.getTolerances() if is_alone else None
        return True

    def keep_types(self) -> None:
        """Have it be an error from now on where types are set by hand."""
        self._are_types_kept = True

    def _forget_types(self, types: tuple) -> None:
        """Forget what was known of a KSP and a preconditioner of other types."""
        if self._types is not None:
            if self._are_types_kept:
                (ksp_type, pc_type), (before, pc_before) = types, self._types
                raise ValueError(
                    f"the solver for '{self.name}' was made to be differentiated as the iterations "
                    f"of ksp_type {before} with pc_type {pc_before}, and has ksp_type {ksp_type} "
                    f"with pc_type {pc_type} now: make another one"
                )
            if self._is_budget and ksp_facts(self._types[0]).has_free_natural_norm:
                # The natural norm may have been asked for, which other methods do not have.
                self.ksp.setNormType(PETSc.KSP.NormType.DEFAULT)
            self._is_direct = False  # it may iterate now
        self._types = types
        self._others = None
        vars(self).pop("may_have_thresholds", None)

    def _beside(self, refined: PETSc.KSP) -> list[PETSc.KSP]:
        """The KSPs, but the one that settings are put on, of which something is changed."""
        if self._others is None:
            if nested.is_self_contained(self.ksp):
                self._others = []
            else:
                inside = nested.all_inside(self.ksp)[1:]
                everywhere = {ksp.handle: ksp for ksp in [*inside, self.ksp]}
                self._overrides.keep(everywhere)
                everywhere.pop(refined.handle, None)
                self._others = [
                    ksp
                    for ksp in everywhere.values()
                    if ksp is self.ksp or self._overrides.atol(ksp) > _NO_ATOL
                ]
        return self._others

    def checked_iterations(self, kind: str) -> int:
        """The iterations that the last solve has spent, on the KSP that settings are put on.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where it failed.
        """
        ksp = self.ksp
        reason = ksp.getConvergedReason()
        if reason not in self.good_reasons:
            raise ConvergenceError(f"the {kind} solve for '{self.name}' {self.failure()}")
        return self._account() if self.is_nested else ksp.getIterationNumber()

    def checked_newton_iterations(self, iterations: int) -> int:
        """The iterations that the steps of a SNES have spent, where they were those of ``ksp``.

        It raises as :meth:`checked_iterations` does.
        """
        return iterations if self._refined is None else self._account()

    def _account(self) -> int:
        assert self._refined is not None  # as this is asked of a KSP inside, which was found
        return self._hidden.account(self._refined.comm, self.ksp.comm, self.name)

    def failure(self) -> str:
        """What went wrong in the last solve."""
        return self._hidden.failure or _failure(self.ksp)


class _HiddenSolves:
    """What solves that others call, of the KSP that settings are put on, spend, and why they fail.

    Attributes
    ----------
    good : frozenset of int
        The converged reasons by which a solve has done what the setting asks.
    failure : str or None
        What went wrong since :meth:`begin`.
    """

    def __init__(self):
        self.good = _GOOD
        self.failure: str | None = None
        self._iterations = 0
        self._post_solve = PostSolve(self._note)

    def watch(self, ksp: PETSc.KSP) -> None:
        """Be told of the solves of a KSP."""
        self._post_solve.put_on(ksp)

    def begin(self) -> None:
        """Forget the solves of before."""
        self._iterations = 0
        self.failure = None

    def _note(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        self._iterations += ksp.getIterationNumber()
        reason = ksp.getConvergedReason()
        # A SNES that trusts a region asks for a step in that.
        if reason not in self.good and reason not in _STOPPED_SHORT:
            self.failure = _failure(ksp)

    def account(self, inside: PETSc.Comm, comm: PETSc.Comm, name: str) -> int:
        """The iterations of the solves since the last account, on the ranks of one of them and of
        the solve that calls them.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where one of them failed, on all ranks.
        """
        failure = self.failure
        if inside.size < comm.size:
            # It is a block of this rank. That of another one may have failed, which raises, too.
            if comm.tompi4py().allreduce(failure is not None, MPI.LOR):
                failure = failure or "has failed on another rank"
        if failure is not None:
            raise ConvergenceError(f"a linear solve inside that for '{name}' {failure}")
        iterations = self._iterations
        self._iterations = 0
        return iterations


def _good_for(setting: Setting | None) -> frozenset[int]:
    """The converged reasons by which a solve has done what a setting asks."""
    if setting is None:
        return _GOOD
    return _GOOD | {_USED_UP} if setting.budget else _GOOD - {_BY_NUMBER}


def _failure(ksp: PETSc.KSP) -> str:
    reason = ksp.getConvergedReason()
    name = _REASONS.get(reason, str(reason))
    A, _ = ksp.getOperators()
    arguments = ("nullspace", False), ("transpose_nullspace", True)
    missing = [
        argument
        for argument, transposed in arguments
        if null_space(A, transposed=transposed) is None
    ]
    remedies = [f"give the solver {missing[0]}=, too"] if len(missing) == 1 else []
    has_no_room = ksp.getPC().getFailedReason() == PETSc.PC.FailedReason.FACTOR_OUTMEMORY
    if name == "DIVERGED_PCSETUP_FAILED" and has_no_room:
        remedies = [_NO_ROOM]
    elif name in _REMEDIES:
        remedies.append(_REMEDIES[name])
    said = f"; {', or '.join(remedies)}" if remedies else ""
    return (
        f"with ksp_type {ksp.getType()} and pc_type {ksp.getPC().getType()} failed: {name} after "
        f"{ksp.getIterationNumber()} iterations, residual norm {ksp.getResidualNorm():.3e}{said}"
    )
