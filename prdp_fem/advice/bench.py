"""The measurements: which methods are tried, how far each goes, and when it is given up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

from prdp_fem.advice.candidates import Candidate, factorisations, iterations, predicted_seconds
from prdp_fem.advice.method import FAILURES, Method, Reference, Row
from prdp_fem.advice.subject import Subject
from prdp_fem.advice.trips import Trips
from prdp_fem.freshness import UNSEEN
from prdp_fem.krylov.nested import is_direct
from prdp_fem.refinement.geometric import GeometricLadder
from prdp_fem.refinement.ladders import NewtonLadder, Tolerance

__all__ = ["Bench"]

_TOLERANCES = (1e-2, 1e-4, 1e-6)
# Digits that are looked for on a ladder; and those of which the settings are kept, of other methods
# than the one at hand.
_ALL_DIGITS, _DIGITS = 6, 3
# The tolerance of a reference that is not factorised, and the most that it may take.
_REFERENCE = Tolerance(1e-10, max_it=100_000)
# A method is given up where a trip costs so many times the cheapest that is exact, and takes longer
# than that is worth a thought; or where it takes too much of the budget.
_HOPELESS, _NEGLIGIBLE, _SHARE = 20, 0.01, 0.05
# Trips are repeated within a round until they have taken so long, and in so many rounds.
_LONG_ENOUGH, _MOST_REPEATS, _ROUNDS = 2e-3, 10, 7
# Methods that cost more than this times the best are not measured again.
_WORTH_REPEATING = 5
# Factorisations that are tried before iterations, which are to be compared with one.
_FIRST = 2
# Options that make no other method of one: what Firedrake has chosen, and how far it goes.
_NO_METHOD = ("mat_type", "ksp_rtol", "ksp_atol", "ksp_max_it", "pc_factor_mat_mumps_icntl_14")


class Bench:
    """What measures methods on one subject. All its methods are collective.

    Parameters
    ----------
    subject : Subject
    budget : float
        Seconds of the processor after which no other method is begun.

    Attributes
    ----------
    methods : list of Method
        The user's own is the first.
    is_symmetric : bool
    """

    def __init__(self, subject: Subject, budget: float):
        self.subject, self.budget = subject, budget
        self.comm = subject.solver.system.comm
        self.methods: list[Method] = []
        self.is_symmetric = False
        self._start = time.thread_time()
        self._reference: Reference | None = None
        self._cheapest = math.inf

    @property
    def newton_steps(self) -> int:
        """Those of the reference, at least one."""
        return 1 if self._reference is None else max(self._reference.trip.newton_steps, 1)

    def run(self) -> None:
        """Measure all."""
        at_hand = self._begin_at_hand()
        direct = factorisations(
            symmetric=self.is_symmetric,
            ranks=self.comm.size,
            other_preconditioner=self.subject.has_other_preconditioner,
        )
        predicted = self._factorise(direct[:_FIRST], predicted_seconds(*self.subject.sizes))
        if self._reference is None:
            predicted = self._factorise(direct[_FIRST:], predicted)
        if self._reference is None:
            self._take_reference(at_hand, _REFERENCE)
        if self._reference is None:
            return
        self._measure(at_hand)
        self._iterate(symmetric=self.is_symmetric)
        if self.is_symmetric and any("INDEFINITE" in one.failure for one in self.methods):
            self._iterate(symmetric=False)
        self._factorise(direct[_FIRST:], predicted)
        _repeat(self.methods, self._reference, self._is_late)

    # Candidates

    def _begin_at_hand(self) -> Method:
        method = Method(self.subject.at_hand)
        self.methods.append(method)
        # What is wrong with samples is wrong with what is asked, and no failure of a method.
        method.trips = self.subject.trips(method.candidate)
        try:
            first = method.trips.go(None, None)
        except (TypeError, ValueError):
            raise
        except FAILURES as error:
            method.fail(error)
            return method
        with method:
            if self.subject.starts_at(first.solutions):
                self.subject.from_zero = True
                method.trips = self.subject.trips(method.candidate)
                method.trips.go(None, None)
            self.is_symmetric = _is_symmetric(method.trips)
            if is_direct(method.trips.solver.snes.getKSP()):
                self._take_reference(method, None)
        return method

    def _factorise(self, candidates: Sequence[Candidate], predicted: float) -> float:
        """Measure factorisations, the first of which that works is the reference.

        Parameters
        ----------
        candidates : sequence of Candidate
        predicted : float
            Seconds that one is known to take at the most.

        Returns
        -------
        float
            The same, as is known now.
        """
        begun = {method.candidate for method in self.methods}
        for candidate in self._others(candidates):
            if candidate in begun:
                continue
            if predicted > self.budget:
                failure = f"not tried: it may take {predicted:.0f} s, which a larger budget allows"
                self.methods.append(Method(candidate, failure=failure))
                continue
            start = time.thread_time()
            method = self._try(candidate)
            if method.trips is not None and not self.subject.varies:
                # What comes next may be slower than what comes first, but not by much.
                predicted = min(predicted, 10 * self._agreed(time.thread_time() - start))
        return predicted

    def _iterate(self, *, symmetric: bool) -> None:
        """Measure the iterative methods for an operator."""
        for candidate in self._others(iterations(symmetric=symmetric, ranks=self.comm.size)):
            self._try(candidate)

    def _others(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that are not the method at hand."""
        mine = {
            name: value
            for name, value in self.subject.at_hand.parameters.items()
            if name not in _NO_METHOD and not name.startswith("snes_")
        }
        return [candidate for candidate in candidates if dict(candidate.parameters) != mine]

    def _try(self, candidate: Candidate) -> Method:
        """Measure a candidate, if there is time left."""
        method = Method(candidate)
        self.methods.append(method)
        if self._is_late():
            method.failure = f"not tried: {self.budget:g} s are over"
            return method
        with method:
            method.trips = self.subject.trips(candidate)
            if candidate.factorises:
                method.trips.go(None, None)
        if self._reference is None and candidate.factorises:
            self._take_reference(method, None)
        if self._reference is not None:
            self._measure(method)
        return method

    def _take_reference(self, method: Method, setting) -> None:
        """Have what a method gives as that which others are compared with."""
        if method.trips is None:
            return
        with method:
            self._reference = Reference(self.comm, method.trips, setting)
            if setting is None:
                self._cheapest = sum(self._reference.trip.seconds)

    # Settings

    def _measure(self, method: Method) -> None:
        """Measure a method at all settings, until it is hopeless."""
        trips, factorises = method.trips, method.candidate.factorises
        if trips is None:
            return
        with method:
            if factorises or method.candidate.is_at_hand:
                self._note(method, trips, "as it is", None)
            if not factorises and not self._has_iterations(method, trips):
                factorises = True
            if factorises:
                self._cheapest = min(self._cheapest, method.rows[-1].least())
            if not factorises or method.candidate.factorises and self.subject.is_nonlinear:
                self._climb(method, trips)
            if not method.failure:
                if not self.subject.varies:
                    _time_set_up(method, trips)
                if not factorises:
                    self._to_tolerances(method, trips)

    @staticmethod
    def _has_iterations(method: Method, trips: Trips) -> bool:
        """Whether there are some to be refined; the user's own may have none."""
        try:
            trips.solver.system.check_setting(Tolerance(1e-2))
        except ValueError:
            if not method.candidate.is_at_hand:
                raise
            method.candidate = method.candidate.without_iterations()
            return False
        return True

    def _ladder(self, method: Method, trips: Trips) -> Sequence:
        """From coarse to fine, for the search of digits."""
        if not self.subject.is_nonlinear:
            return GeometricLadder()
        if method.candidate.factorises:
            return NewtonLadder(start=1, stop=self.newton_steps)
        assert self._reference is not None
        probe = trips.go(Tolerance(1e-1, max_it=1000), self._reference.cotangents)
        start = max(1, round(probe.iterations[0] / max(probe.newton_steps, 1)))
        return NewtonLadder(start=1, stop=self.newton_steps, linear=GeometricLadder(start=start))

    def _climb(self, method: Method, trips: Trips) -> None:
        """Go up a ladder, and keep the first settings that give a digit, two, and so on."""
        assert self._reference is not None
        kept = _ALL_DIGITS if method.candidate.is_at_hand else _DIGITS
        found, last = 0, -math.inf
        ladder = self._ladder(method, trips)
        trips.go(ladder[0], self._reference.cotangents)  # sets up what is kept
        for setting in ladder:
            row = self._reference.compare(trips, "", setting)
            digits = row.digits()
            method.curve.append((setting, digits))
            if digits >= found + 1 and found < kept:
                found = min(math.floor(digits), kept)
                row.asked = f"{found} digit{'s' if found > 1 else ''}"
                method.rows.append(row)
            # No level gives more where rounding is all that is left.
            if digits >= _ALL_DIGITS or _DIGITS <= digits <= last or self._is_late():
                return
            last = digits
            if not method.candidate.is_at_hand and (why := self._why_stop(row)):
                if digits < _DIGITS:
                    method.failure = (
                        f"stopped: {why} after {row.trip.iterations[0]} iterations, with"
                        f" {max(digits, 0):.1f} digits"
                    )
                return

    def _why_stop(self, row: Row) -> str:
        """Why a method is given up; empty where it is not."""
        cost = row.least()
        if math.isinf(row.error):
            return "it diverges"
        if cost > max(_HOPELESS * self._cheapest, _NEGLIGIBLE):
            return f"{cost / self._cheapest:.0f} times a factorisation's cost"
        return f"{cost:.2g} s a sample" if cost > _SHARE * self.budget else ""

    def _to_tolerances(self, method: Method, trips: Trips) -> None:
        """Measure to relative tolerances, with as many iterations as are not hopeless."""
        known = max((row for row in method.rows if row.setting), key=Row.least, default=None)
        most = 100_000
        if known is not None and any(known.trip.iterations) and not method.candidate.is_at_hand:
            forward, backward = known.trip.iterations
            worth = max(_HOPELESS * self._cheapest, _NEGLIGIBLE)
            most = max(100, int(min(worth, self.budget) / known.least() * (forward + backward)))
        for rtol in _TOLERANCES:
            self._note(method, trips, f"rtol {rtol:.0e}", Tolerance(rtol, max_it=most))

    # Trips

    def _note(self, method: Method, trips: Trips, asked: str, setting) -> None:
        assert self._reference is not None
        method.rows.append(self._reference.compare(trips, asked, setting))

    # Time, on all ranks alike

    def _agreed(self, seconds: float) -> float:
        return self.comm.bcast(seconds)

    def _is_late(self) -> bool:
        return self._agreed(time.thread_time() - self._start) > self.budget


def _repeat(methods: Sequence[Method], reference: Reference, is_late: Callable[[], bool]) -> None:
    """Measure all that was kept again, in turns, so that what else runs hits all alike."""
    pairs = [(one, row) for one in methods for row in one.rows if one.trips is not None]
    least = min((row.least() for _, row in pairs if row.digits() >= 1), default=0.0)
    worth = [(one, row) for one, row in pairs if row.least() <= _WORTH_REPEATING * least]
    for method, row in worth * _ROUNDS:
        trips = method.trips
        if is_late():
            return
        if trips is None:
            continue
        usual = max(row.least() * trips.rows, 1e-6)
        with method:
            times = [
                trips.go(row.setting, reference.cotangents).seconds
                for _ in range(min(max(1, round(_LONG_ENOUGH / usual)), _MOST_REPEATS))
            ]
            forward, backward = (median(some) for some in zip(*times))
            row.seconds.append((forward, backward))


def _time_set_up(method: Method, trips: Trips) -> None:
    """How much longer a trip takes where all is made anew."""
    if method.rows:
        setting = method.rows[0].setting
        usual = sum(trips.go(setting, None).seconds)
        trips.solver.system.place.clock.changed(UNSEEN)
        method.set_up = max(sum(trips.go(setting, None).seconds) - usual, 0.0)


def _is_symmetric(trips: Trips) -> bool:
    """Whether the operator of the last trip is symmetric."""
    try:
        return trips.solver.system.linearisation.krylov.symmetry.has_symmetric_operator.value
    except FAILURES:
        return False
