"""What preconditioners depend on beside the forms of a problem: an application context, and what a
user's own code names.
"""

from __future__ import annotations

import dis
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace

import ufl
from firedrake import DirichletBC, Function
from firedrake.slate.static_condensation.sc_base import SCBase

from prdp_fem.problem.firedrake_internals import boundary_expression
from prdp_fem.problem.inputs import coefficients_of

__all__ = [
    "coefficients_in",
    "condenses_locally",
    "over_copies",
    "users_code",
    "users_context",
]

# Whose code names no coefficient of a user's: it is given them by forms and by the application
# context.
_LIBRARIES = frozenset(
    {
        "firedrake",
        "FIAT",
        "finat",
        "gem",
        "mpi4py",
        "numpy",
        "petsc4py",
        "petsctools",
        "prdp_fem",
        "pyadjoint",
        "pyop2",
        "scipy",
        "torch",
        "tsfc",
        "ufl",
        *sys.stdlib_module_names,
    }
    - {"__main__"}
)
_GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_SYMBOLIC = (ufl.core.expr.Expr, ufl.BaseForm)


def users_context(context: Mapping | None, solution: Function) -> dict:
    """The application context that a user has given.

    Firedrake keeps the state that it solves for in there, too: that of a solver which was there
    before is not this one's.
    """
    return {key: value for key, value in (context or {}).items() if value is not solution}


def over_copies(value, copy_of: Callable):
    """Part of an application context with copies in the place of coefficients.

    Parameters
    ----------
    value : object
        An expression or form, a condition, a dictionary, list, tuple or namespace of such, or
        anything else.
    copy_of : callable
        Gives what stands for an expression or a form.

    Returns
    -------
    object
        A new one where something was replaced; the same one elsewhere.
    """
    if isinstance(value, _SYMBOLIC):
        return copy_of(value)
    if isinstance(value, DirichletBC):
        given = boundary_expression(value)
        return value.reconstruct(g=copy_of(given)) if coefficients_of(given) else value
    if isinstance(value, SimpleNamespace):
        inside = over_copies(vars(value), copy_of)
        return value if inside is vars(value) else type(value)(**inside)
    if isinstance(value, dict):
        inside = {key: over_copies(part, copy_of) for key, part in value.items()}
        if all(inside[key] is part for key, part in value.items()):
            return value
        copied = value.copy()
        copied.update(inside)
        return copied
    if isinstance(value, (list, tuple)):
        inside = [over_copies(part, copy_of) for part in value]
        if all(one is other for one, other in zip(inside, value)):
            return value
        return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)
    return value


def coefficients_in(values: Iterable) -> tuple[list, list]:
    """The coefficients that something depends on, each once, in a fixed order.

    Parameters
    ----------
    values : iterable
        Expressions, forms, conditions, containers of such, a user's objects, functions and classes.

    Returns
    -------
    list
        Those for which :func:`over_copies` puts in copies.
    list
        Those that a user's code finds by itself: by a name of its module, in a closure, as an
        attribute.
    """
    told: dict = {}
    named: dict = {}
    _Search(told, named).look_at(list(values), told)
    return list(told), list(named)


class _Search:
    def __init__(self, told: dict, named: dict):
        self._told, self._named = told, named
        self._seen: dict[int, object] = {}

    def look_at(self, value, found: dict) -> None:
        if isinstance(value, DirichletBC):
            value = boundary_expression(value)
        if isinstance(value, _SYMBOLIC):
            found.update(dict.fromkeys(coefficients_of(value)))
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, (Mapping, list, tuple, SimpleNamespace)):
            # Of these over_copies makes others; what is in a user's objects stays there.
            if isinstance(value, SimpleNamespace):
                value = vars(value)
            for part in value.values() if isinstance(value, Mapping) else value:
                self.look_at(part, found)
            return
        for part in _parts(value):
            self.look_at(part, self._named)


def _parts(value) -> Iterator:
    """What a user's object, function or class has at hand."""
    if isinstance(value, (set, frozenset)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif isinstance(value, FunctionType):
        if not _is_of_library(value):
            yield from _of_function(value)
    elif isinstance(value, type):
        for base in value.__mro__:
            if not _is_of_library(base):
                yield from list(vars(base).values())
    elif (
        hasattr(value, "__dict__")
        and not isinstance(value, ModuleType)
        and not _is_of_library(type(value))
    ):
        yield from list(vars(value).values())
        yield type(value)


def _of_function(function: FunctionType) -> Iterator:
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing is in it yet
            pass
    for code in _codes(function.__code__):
        names = {
            instruction.argval
            for instruction in dis.get_instructions(code)
            if instruction.opname in _GLOBALS
        }
        for value in [
            function.__globals__[name] for name in sorted(names & function.__globals__.keys())
        ]:
            if not isinstance(value, ModuleType):
                yield value
            elif value.__name__.partition(".")[0] not in _LIBRARIES:
                yield [getattr(value, name) for name in code.co_names if hasattr(value, name)]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_of_library(thing) -> bool:
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] in _LIBRARIES


def users_code(options: Mapping) -> list[type]:
    """A user's own classes among those that options name, as ``pc_python_type`` does."""
    return [kind for kind in _classes_in(options) if not _is_of_library(kind)]


def condenses_locally(options: Mapping) -> bool:
    """Whether options name a preconditioner that inverts the matrices of cells.

    HybridizationPC does. Where one is singular, as with a coefficient that has no values yet, the
    code that Slate has generated ends the process: no error can be caught.
    """
    return any(issubclass(kind, SCBase) for kind in _classes_in(options))


def _classes_in(options: Mapping) -> list[type]:
    """The classes that options name."""
    found = []
    for name in sorted(options):
        if name.endswith("python_type"):
            module, _, attribute = str(options[name]).rpartition(".")
            try:
                kind = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError, ValueError):
                continue  # PETSc will say so
            if isinstance(kind, type):
                found.append(kind)
    return found
