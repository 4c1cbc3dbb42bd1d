"""What can be unrolled: the methods and the preconditioners of PETSc that are stated again here.

Each is registered once, by a decorator of the class that states it. Whoever asks what there is
reads that: :class:`~prdp_fem.unrolled.UnrolledKSP`, messages and warnings, and the documentation,
which a test compares with it. So a method or a preconditioner of one's own takes one class, in any
module::

    @unrolled_methods("cgs")
    class ConjugateGradientsSquared(Iteration):
        @classmethod
        def of(cls, found):          # what is to be known of the KSP; see KSPAsSet
            return cls()
        ...

The classes are described in :mod:`prdp_fem.unrolled.methods`, and by
:class:`~prdp_fem.unrolled.preconditioners.Preconditioner`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from firedrake.petsc import PETSc

from prdp_fem.krylov.view import described, setting, settings

__all__ = [
    "Entry",
    "KSPAsSet",
    "PCAsSet",
    "Registry",
    "restated_preconditioners",
    "unrolled_methods",
]

_PYTHON = "python"


@dataclass(frozen=True)
class Entry:
    """A type, and what states it again.

    Attributes
    ----------
    name : str
        What options call it; for a class that PETSc calls, ``python`` and where that is found.
    restated : type
        Its class method ``of`` makes an object from a :class:`KSPAsSet` or a :class:`PCAsSet`, and
        raises a ValueError for what options set that it does not state; that of a preconditioner
        may give None then, and so have it taken for constant.
    note : str
        What the documentation says of its limits, in a few words.
    """

    name: str
    restated: type[Any]
    note: str = ""


class Registry:
    """The types of a kind of PETSc object that are stated again.

    Parameters
    ----------
    option : str
        The option that names the type, such as ``ksp_type``.
    """

    def __init__(self, option: str):
        self.option = option
        self._entries: dict[str | type, Entry] = {}

    def __call__(self, kind: str | type, note: str = "", *, name: str | None = None) -> Callable:
        """A decorator that registers a class.

        Parameters
        ----------
        kind : str or type
            A type of PETSc's, or a class for one in Python, of which subclasses are instances, too.
        note : str
            See :class:`Entry`.
        name : str or None
            What to call a class where options are to say it; None for where it is defined.

        Raises
        ------
        ValueError
            Where there is one already.
        """
        if kind in self._entries:
            raise ValueError(
                f"{self.option} {self._entries[kind].name} is stated again already, "
                f"by {self._entries[kind].restated.__qualname__}"
            )
        if isinstance(kind, type):
            shown = f"{_PYTHON} with {name or f'{kind.__module__}.{kind.__qualname__}'}"
        else:
            shown = kind

        def register(restated: type) -> type:
            self._entries[kind] = Entry(shown, restated, note)
            return restated

        return register

    def __iter__(self) -> Iterator[Entry]:
        """All there is: PETSc's types by their names, and then classes."""
        return iter(
            sorted(
                self._entries.values(),
                key=lambda entry: (entry.name.startswith(_PYTHON), entry.name),
            )
        )

    def find(self, thing: PETSc.KSP | PETSc.PC) -> Entry | None:
        """What states an object of PETSc's again; None where nothing does."""
        kind = thing.getType()
        if kind != _PYTHON:
            return self._entries.get(kind)
        classes = self._class_of(thing).__mro__
        return next((self._entries[one] for one in classes if one in self._entries), None)

    def _class_of(self, thing: PETSc.KSP | PETSc.PC) -> type:
        """The class of the object of Python that one of PETSc's is, or will be."""
        context = thing.getPythonContext()
        if context is not None:
            return type(context)
        prefix = self.option.removesuffix("type")
        options = PETSc.Options(thing.getOptionsPrefix())
        name = thing.getPythonType() or options.getString(f"{prefix}python_type", "")
        return pkgutil.resolve_name(name) if name else object


class _AsSet:
    """What an object of PETSc's says of how it is set."""

    _thing: PETSc.Object
    _options: Mapping | None

    @cached_property
    def text(self) -> str:
        """What PETSc prints when it views the object; the first use is collective."""
        return described(self._thing)

    def number(self, pattern: str, option: str) -> float:
        """A number to its last digit.

        Parameters
        ----------
        pattern : str
            A regular expression with a group, which finds it in :attr:`text`.
        option : str
            What sets it, without prefix.

        Raises
        ------
        ValueError
            Where it was printed rounded, and no option says which it is.
        """
        return setting(self._thing, self.text, pattern, option, self._options)

    def numbers(self, pattern: str, option: str) -> list[float]:
        """Several numbers that one option sets; see :meth:`number`."""
        return settings(self._thing, self.text, pattern, option, self._options)


class KSPAsSet(_AsSet):
    """A KSP that is set up, and what it says of how it is set.

    Parameters
    ----------
    ksp : PETSc.KSP
    options : mapping or None
        Its options without prefix, where PETSc's own may have lost them.
    """

    def __init__(self, ksp: PETSc.KSP, options: Mapping | None):
        self.ksp = self._thing = ksp
        self._options = options

    @cached_property
    def text(self) -> str:
        """What PETSc prints when it views the KSP without its preconditioner."""
        return described(self.ksp).split("PC Object")[0]


class PCAsSet(_AsSet):
    """A preconditioner that is set up, and what it says of how it is set.

    Parameters
    ----------
    pc : PETSc.PC
    matrix : PETSc.Mat
        What it is made from.
    options : mapping or None
        Options of its KSP without prefix, where PETSc's own may have lost them.
    """

    def __init__(self, pc: PETSc.PC, matrix: PETSc.Mat, options: Mapping | None):
        self.pc = self._thing = pc
        self.matrix = matrix
        self._options = options


unrolled_methods = Registry("ksp_type")
restated_preconditioners = Registry("pc_type")
