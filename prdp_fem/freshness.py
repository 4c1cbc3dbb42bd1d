"""One idea of freshness: what is kept says what it was made from.

It is made anew once that has changed.

A clock counts changes, and knows when each source of what is kept has changed last. Whoever changes
a source tells the clock, on all ranks alike; nobody else has to know what was made from it.
"""

from __future__ import annotations

from collections import defaultdict
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
        self._made_from: defaultdict[Hashable, list[Kept]] = defaultdict(list)

    def changed(self, *sources: Hashable) -> None:
        """Note that sources have changed, all at once, and drop what was made from them."""
        self.now += 1
        for source in sources:
            self._moments[source] = self.now
            for kept in self._made_from[source]:
                kept.drop()

    def have_dropped(self, kept: Kept, sources: Iterable[Hashable]) -> None:
        """Drop what is kept whenever one of some sources changes."""
        for source in sources:
            self._made_from[source].append(kept)

    def last(self, sources: Iterable[Hashable]) -> int:
        """When the last of some sources has changed; 0 where none has."""
        return max([self._moments.get(source, 0) for source in sources], default=0)

    def since(self, moment: int, sources: Iterable[Hashable]) -> frozenset:
        """Those of some sources that have changed after a moment."""
        return frozenset(source for source in sources if self._moments.get(source, 0) > moment)


class _WhereMissing(Generic[T]):
    """An attribute that Python asks for only where the object has none of that name."""

    def __get__(self, kept: Kept[T], owner: type) -> T:
        return kept.make()


class Kept(Generic[T]):
    """Something that is kept until a source of it changes.

    It is made when it is first read, and where making it raises, when it is read again. As long as
    no source changes, to read it is to read an attribute.

    Parameters
    ----------
    make : callable
        Makes it.
    clock : Clock
    on : iterable of hashable
        The sources that it is made from.

    Attributes
    ----------
    value
        What is valid now.
    """

    value = _WhereMissing[T]()

    def __init__(self, make: Callable[[], T], clock: Clock, on: Iterable[Hashable]):
        self._make = make
        self._clock = clock
        self._on = frozenset(on)
        clock.have_dropped(self, self._on)

    def make(self) -> T:
        """Make it, and keep it, unless a source of it has changed meanwhile."""
        now = self._clock.now
        value = self._make()
        if self._clock.last(self._on) <= now:
            self.put(value)
        return value

    def ensure(self) -> None:
        """Make it, unless it is there: for what is done once rather than read."""
        if "value" not in vars(self):
            self.make()

    def put(self, value: T) -> None:
        """Have something in it that is valid now, and was not made by it."""
        vars(self)["value"] = value

    def drop(self) -> None:
        """Have it made anew when it is read next, since a source has changed, or it was used up."""
        vars(self).pop("value", None)
