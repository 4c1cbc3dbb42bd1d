"""The refinements that a study compares, by name."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpi4py import MPI

from prdp_fem.arguments import count, instance, shown
from prdp_fem.refinement.ladders import Iterations, Setting
from prdp_fem.refinement.rules import FixedRefinement, ProgressiveRefinement, Refinement

__all__ = ["CONVERGED", "PRDP", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """A refinement to be made anew for each run.

    Parameters
    ----------
    kind : str
        ``"converged"``, ``"constant"`` or ``"prdp"``.
    iterations : int or None
        Of a constant schedule.
    tau_step, tau_stop : float or None
        Of progressive refinement, where they are not the package's defaults.
    """

    kind: str
    iterations: int | None = None
    tau_step: float | None = None
    tau_stop: float | None = None

    def __post_init__(self):
        if self.kind not in ("converged", "constant", "prdp"):
            raise ValueError(f"kind must be 'converged', 'constant' or 'prdp', found "
                             f"{shown(self.kind)}")
        if self.kind == "constant":
            count("iterations", self.iterations)
        elif self.iterations is not None:
            raise ValueError(f"iterations are those of a constant schedule, found "
                             f"{shown(self.iterations)} for a {self.kind} one")
        thresholds = {"tau_step": self.tau_step, "tau_stop": self.tau_stop}
        given = {name: value for name, value in thresholds.items() if value is not None}
        if given and (self.kind != "prdp" or len(given) < 2):
            raise ValueError(f"a prdp schedule has both tau_step and tau_stop or none, and others "
                             f"have none, found {given}")
        ProgressiveRefinement([Iterations(1)], **given)  # refuses other thresholds

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """The schedule that a name means.

        Parameters
        ----------
        text : str
            ``converged``; a number K, for K iterations throughout; ``prdp``, or ``prdp:TAU_STEP:TAU_STOP``.

        Raises
        ------
        ValueError
            For anything else.
        """
        instance("text", text, str, "a string, such as 'prdp'")
        if text == "converged":
            return cls("converged")
        if re.fullmatch("[1-9][0-9]{0,8}", text):
            return cls("constant", iterations=int(text))
        kind, *thresholds = text.split(":")
        if kind == "prdp" and len(thresholds) in (0, 2):
            try:
                step, stop = (float(threshold) for threshold in thresholds) if thresholds else (None, None)
                ProgressiveRefinement([Iterations(1)], **{} if step is None else {"tau_step": step, "tau_stop": stop})
            except ValueError as error:
                raise ValueError(f"{text!r}: {error}") from None
            return cls("prdp", tau_step=step, tau_stop=stop)
        raise ValueError(f"a schedule is converged, prdp, prdp:TAU_STEP:TAU_STOP or a number of iterations, found {text!r}")

    @property
    def name(self) -> str:
        """What ``from_text`` reads."""
        if self.kind == "constant":
            return str(self.iterations)
        return self.kind if self.tau_step is None else f"{self.kind}:{self.tau_step!r}:{self.tau_stop!r}"

    @property
    def title(self) -> str:
        """What tables and figures say."""
        if self.kind == "constant":
            return f"K = {self.iterations}"
        if self.kind == "converged":
            return "converged"
        return "PRDP" if self.tau_step is None else f"PRDP {self.tau_step:g}, {self.tau_stop:g}"

    @property
    def colour(self) -> str:
        """What figures draw it in: converged and progressively refined physics are told apart by the colour-blind as well."""
        return {"converged": "#D55E00", "prdp": "#0072B2", "constant": "0.6"}[self.kind]

    def refinement(self, *, ladder: Sequence[Setting], converged: Setting, constant: Callable[[int], Setting] = Iterations,
                   comm: MPI.Comm | None = None) -> Refinement:
        """The refinement, at its start.

        Parameters
        ----------
        ladder : Sequence of Setting
            What progressive refinement goes up.
        converged : Setting
            What "converged" means.
        constant : callable
            From a number of iterations to a setting.
        comm : mpi4py.MPI.Comm or None
            See :class:`~prdp_fem.refinement.rules.Refinement`.
        """
        if self.kind == "constant":
            return FixedRefinement(constant(self.iterations), comm=comm)
        if self.kind == "converged":
            return FixedRefinement(converged, comm=comm)
        thresholds = {} if self.tau_step is None else {"tau_step": self.tau_step, "tau_stop": self.tau_stop}
        return ProgressiveRefinement(ladder, comm=comm, **thresholds)


CONVERGED, PRDP = Schedule("converged"), Schedule("prdp")  # what is compared, where nothing else is said
