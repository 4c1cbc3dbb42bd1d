"""One idea of freshness: what is kept says what it was made from.

It is made anew once that has changed.

A clock counts changes, and knows when each source of what is kept has changed last. Whoever changes
a source tells the clock, on all ranks alike; nobody else has to know what was made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["BOUNDARY", "MEMORY", "MESH", "METHOD", "STATE", "UNSEEN", "USERS_CODE", "Clock", "Kept"]

# The sources beside the inputs of a problem, which are named by their places.
MESH = "mesh"
MEMORY = "memory"  # where everything lies; that an error leaves half-way is another one, too
METHOD = "method"  # the types of a KSP and its preconditioner
STATE = "state"  # that an operator is assembled at
BOUNDARY = "boundary"  # the values that were lifted last
USERS_CODE = "user's code"  # which reads whatever it likes
UNSEEN = "unseen"  # what only the user can tell has changed

_NEVER = -1

T = TypeVar("T")


class Clock:
    """A logical clock: it goes on by one with each change.

    Attributes
    ----------
    now : int
        The number of changes so far.
    """

    def __init__(self):
        self.now = 0
        self._moments: dict[Hashable, int] = {}

    def changed(self, *sources: Hashable) -> None:
        """Note that sources have changed, all at once."""
        self.now += 1
        for source in sources:
            self._moments[source] = self.now

    def last(self, sources: Iterable[Hashable]) -> int:
        """When the last of some sources has changed; 0 where none has."""
        return max([self._moments.get(source, 0) for source in sources], default=0)

    def since(self, moment: int, sources: Iterable[Hashable]) -> frozenset:
        """Those of some sources that have changed after a moment."""
        return frozenset(source for source in sources if self._moments.get(source, 0) > moment)


class Kept(Generic[T]):
    """Something that is kept until a source of it changes; called, it gives what is valid now.

    It is made at the first call, and where making it raises, at the next one. As long as the clock
    stands still a call is one comparison.

    Parameters
    ----------
    make : callable
        Makes it.
    clock : Clock
    on : iterable of hashable
        The sources that it is made from.
    """

    __slots__ = ("_clock", "_made", "_make", "_on", "_seen", "_value")

    def __init__(self, make: Callable[[], T], clock: Clock, on: Iterable[Hashable]):
        self._make = make
        self._clock = clock
        self._on = tuple(on)
        self._made = self._seen = _NEVER
        self._value: T = None  # type: ignore[assignment]  # nobody sees it before it is made

    def __call__(self) -> T:
        if self._seen != self._clock.now:
            self._look()
        return self._value

    def _look(self) -> None:
        # From before it is made: what changes meanwhile has it made anew.
        now = self._clock.now
        if self._made < self._clock.last(self._on):
            self._value = self._make()
            self._made = now
        self._seen = now

    def put(self, value: T) -> None:
        """Have something in it that is valid now, and was not made by it."""
        self._value = value
        self._made = self._seen = self._clock.now

    def drop(self) -> None:
        """Have it made anew whatever its sources are, since it was used up."""
        self._made = self._seen = _NEVER
