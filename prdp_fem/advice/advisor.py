"""Advice on what to use for a problem, by measurements on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prdp_fem.advice.advice import Advice
from prdp_fem.advice.bench import Bench
from prdp_fem.advice.method import Method
from prdp_fem.advice.rule import Choice, choose
from prdp_fem.advice.subject import Subject
from prdp_fem.arguments import is_real, shown
from prdp_fem.refinement.geometric import GeometricLadder
from prdp_fem.refinement.ladders import NewtonLadder

__all__ = ["advise"]

# A ladder starts where half a digit is right, and stops where six are: what is coarser says little
# about where to go, and what is finer nothing that a network could learn.
_FIRST_DIGITS, _LAST_DIGITS = 0.5, 6


def advise(solver_or_layer, *samples, budget: float = 10.0) -> Advice:
    """Measure what solves of a problem cost, forward and backward, and say what to use.

    Other solvers of the same problem are made, with its conditions, null spaces and callbacks: one
    for each factorisation that PETSc has for the operator, and for each preconditioner that suits
    it (whether it is symmetric is found out). They go forward and backward with the same samples,
    to relative tolerances of 1e-2, 1e-4 and 1e-6, and up a ladder until they have given three
    digits of solution and derivative (the user's own method: six). The solver itself is left as it
    is. Collective; decisions are made by numbers that all ranks have, so all get the same advice.

    Parameters
    ----------
    solver_or_layer : RefinedSolver or SolverLayer
        A solver is looked at as its coefficients are now, from its guess (from zero, where that is
        the solution already), and its operator counts as constant unless the problem is nonlinear.
        A layer's operator is made anew for each sample where one of its controls is in it.
    *samples : torch.Tensor
        Of a layer, one for each control, as it is called with: such as a training meets. Two of a
        batch are used, and a factorisation that is made for each is made twice, forward and
        backward; of a sample alone once. Derivatives are by those that require gradients, or all.
    budget : float
        Seconds of the processor after which no other method is begun, nor repeated. A factorisation
        that would take longer, by the laws of nested dissection, is not tried; nothing interrupts
        one.

    Returns
    -------
    Advice

    Raises
    ------
    TypeError, ValueError
        For another object, samples that do not fit it, and a problem whose solution is zero.

    Notes
    -----
    The rule. What a sample costs, forward and backward, is compared at the accuracy that a training
    needs. A factorisation gives all digits; it costs two triangular solves where it is kept, and is
    made anew where the operator varies. Iterations cost about in proportion to the
    digits. How many are needed is not known beforehand: trainings that were measured ended at two
    to three digits of the solver's solution, and a refinement gets there by way of coarser ones, so
    that two digits are what a solve needs in the mean. The cheapest at *two digits* is advised;
    a factorisation also where it costs up to 20 % more than iterations, since there is nothing to
    be refined, and no error; of methods of a kind that are within 15 % of each other, the user's
    own, then the simplest. The advice is sure where it is the same for one digit and for three.

    Of a nonlinear problem the same is said of whole solves: a factorisation in each Newton step,
    where the ladder is one of steps, or iterations in each.

    Derivatives are implicit ones. Those of unrolled iterations cost more, and no factorisation has
    them.

    Examples
    --------
    >>> advice = prdp_fem.advise(physics, inputs)  # doctest: +SKIP
    >>> print(advice)  # doctest: +SKIP
    >>> solver = prdp_fem.LinearVariationalSolver(  # doctest: +SKIP
    ...     problem, solver_parameters=advice.solver_parameters
    ... )
    """
    if not is_real(budget) or not budget > 0:
        raise ValueError(f"budget must be a number of seconds above 0, found {shown(budget)}")
    subject = Subject(solver_or_layer, samples)
    bench = Bench(subject, float(budget))
    try:
        bench.run()
    except ZeroDivisionError:
        raise ValueError(
            f"the solution '{subject.name}' is zero, which any method finds at once: give"
            " coefficients, or samples, values such as they will have"
        ) from None
    subject.solver.system.collect_garbage()
    return _conclusion(subject, bench)


def _conclusion(subject: Subject, bench: Bench) -> Advice:
    """What follows from all that was measured."""
    table = [row for method in bench.methods for row in method.measurements()]
    choice = choose(table)
    found = bench.methods[0]
    if choice is not None:
        found = next(one for one in bench.methods if one.candidate.name == choice.chosen.method)
    return Advice(
        dict(subject.parameters(found.candidate)),
        None if choice is None else _ladder(choice, found, bench),
        table,
        choice,
        _problem_in_words(subject, bench),
    )


def _ladder(choice: Choice, method: Method, bench: Bench) -> Sequence | None:
    """The levels for a method; None for one that has nothing to refine."""
    if method.candidate.factorises:
        # Newton steps are to be refined where there is something to be saved.
        is_whole = choice.chosen.setting is None
        return None if is_whole else NewtonLadder(start=1, stop=bench.newton_steps)
    start, stop = _ends(method.curve)
    if not bench.subject.is_nonlinear:
        return GeometricLadder(start=start, stop=stop)
    linear = GeometricLadder(start=start, stop=stop)
    return NewtonLadder(start=1, stop=bench.newton_steps, linear=linear)


def _ends(curve: Sequence[tuple[Any, float]]) -> tuple[int, int | None]:
    """The iterations at which a ladder starts and stops; None where that was not seen."""
    start = next((setting for setting, digits in curve if digits >= _FIRST_DIGITS), curve[0][0])
    stop = next((setting for setting, digits in curve if digits >= _LAST_DIGITS), None)
    return start.max_it, None if stop is None else stop.max_it


def _problem_in_words(subject: Subject, bench: Bench) -> str:
    kind = "a nonlinear problem" if subject.is_nonlinear else "a linear problem"
    symmetric = "symmetric" if bench.is_symmetric else "unsymmetric"
    varies = "made anew for each sample" if subject.varies else "kept"
    ranks = f" on {bench.comm.size} ranks" if bench.comm.size > 1 else ""
    start = ", from zero" if subject.from_zero else ""
    return (
        f"'{subject.name}': {kind} of {subject.unknowns} unknowns{ranks}, its operator"
        f" {symmetric} and {varies}{start}"
    )
