"""The structure of the code, against what CONTRIBUTING.md says of it.

That is floors, private names of libraries, and sizes. Nothing is imported:
sources are read.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prdp_fem"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
# These only collect names for users, those of training in prdp_fem.torch.
COLLECTIONS = ("prdp_fem/__init__.py", "prdp_fem/torch/__init__.py")
INTERNALS = "prdp_fem/problem/firedrake_internals.py"
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}

# What is private to other libraries than Firedrake, and has no public way, by module.
PRIVATE_ELSEWHERE = {
    "prdp_fem/assembly/right_hand_side.py": {"_ufl_is_terminal_"},
    "prdp_fem/studies/command_line.py": {"_option_string_actions"},
    "prdp_fem/torch/autograd.py": {"_C", "_are_functorch_transforms_active", "_functorch"},
    "prdp_fem/torch/layer.py": {
        "_C",
        "_TorchDispatchModeKey",
        "_dynamo",
        "_get_dispatch_mode",
        "_get_tracing_state",
        "_len_torch_dispatch_stack",
    },
    "prdp_fem/training/loop.py": {"_milestones", "_schedulers"},
    "prdp_fem/training/reduction.py": {
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_version",
    },
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the page's table whose first line this is, without backticks around them."""
    lines = PAGE[PAGE.index(heading) :].splitlines()[2:]
    end = next(
        (number for number, line in enumerate(lines) if not line.startswith("|")), len(lines)
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


FLOORS = {
    room: int(floor)
    for floor, rooms in rows("| floor | rooms |")
    for room in re.findall(r"`(\w+)`", rooms)
}
EXCEPTIONS = {
    (where.strip("`"), what.strip("`")) for where, what, _ in rows("| where | what | why |")
}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported_by(tree: ast.Module) -> set[str]:
    """The modules of the package that are imported anywhere in a module, in functions, too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the package"
            # from prdp_fem import x may name a module.
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "prdp_fem"
                else {node.module}
            )
    return {module for module in found if module.startswith("prdp_fem.")}


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in COLLECTIONS])
def test_imports_go_down(name):
    """To a lower floor, or within a room; so there are no circles of rooms, either."""
    room = room_of(name.removesuffix(".py").replace("/", "."))
    assert room in FLOORS, f"{room} has no floor in CONTRIBUTING.md"
    wrong = {
        module
        for module in imported_by(TREES[name])
        if room_of(module) != room and FLOORS[room_of(module)] >= FLOORS[room]
    }
    assert not wrong, f"{name} is on floor {FLOORS[room]} and imports {sorted(wrong)}"


# --- private names --------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names() -> set[str]:
    """The private names that the package itself gives to anything."""
    found = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=own) | ast.ClassDef(name=own) | ast.arg(arg=own):
                    found.add(own)
                case ast.Attribute(
                    value=ast.Name(id="self" | "cls"), attr=own, ctx=ast.Store()
                ) if name != INTERNALS:
                    found.add(own)
                case ast.Name(id=own, ctx=ast.Store()):
                    found.add(own)
                case ast.alias(name=own, asname=other):
                    found |= {own, other}
    return {own for own in found if own and is_private(own)}


OWN = own_names()


@pytest.mark.parametrize("name", [name for name in SOURCES if name != INTERNALS])
def test_private_names_of_libraries_are_in_one_module(name):
    found = []
    for node in ast.walk(TREES[name]):
        match node:
            case ast.Attribute(attr=attribute) if is_private(attribute) and (
                attribute not in OWN or attribute.startswith("_ad_")
            ):
                found.append((node.lineno, attribute))
            case ast.ImportFrom(module=module, names=names) if module and not module.startswith(
                "prdp_fem"
            ):
                private = [
                    part
                    for part in (*module.split("."), *(alias.name for alias in names))
                    if is_private(part)
                ]
                found += [(node.lineno, part) for part in private]
            case ast.Import(names=names):
                found += [
                    (node.lineno, alias.name)
                    for alias in names
                    if any(map(is_private, alias.name.split(".")))
                ]
    found = [
        (line, private) for line, private in found if private not in PRIVATE_ELSEWHERE.get(name, ())
    ]
    assert not found, (
        f"{name} uses {found}, which are private to a library: put what needs them into {INTERNALS}"
    )


# --- sizes ----------------------------------------------------------------------------------------


def parts(node: ast.AST, names: tuple[str, ...] = ()):
    """Classes and functions, with their names in full."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            yield child, ".".join((*names, child.name))
            yield from parts(child, (*names, child.name))
        else:
            yield from parts(child, names)


def too_large(part: ast.ClassDef | ast.FunctionDef) -> str:
    """What is wrong with the size of a class or function, empty where nothing is."""
    lines = part.end_lineno - part.lineno + 1
    if isinstance(part, ast.ClassDef):
        return f"a class of {lines} lines, where 250 are the most" if lines > 250 else ""
    arguments = [
        argument.arg
        for argument in (*part.args.posonlyargs, *part.args.args, *part.args.kwonlyargs)
    ]
    if arguments[:1] in (["self"], ["cls"]):
        del arguments[0]
    found = [f"{lines} lines, where 60 are the most"] if lines > 60 else []
    found += [f"{len(arguments)} parameters, where 7 are the most"] if len(arguments) > 7 else []
    return f"a function of {' and '.join(found)}" if found else ""


@pytest.mark.parametrize("name", SOURCES)
def test_classes_and_functions_are_of_a_size_that_can_be_read(name):
    wrong = [
        f"{what} is {why}"
        for part, what in parts(TREES[name])
        if (why := too_large(part)) and (name, what) not in EXCEPTIONS
    ]
    assert not wrong, f"in {name} {'; '.join(wrong)}: divide it, or say why not in CONTRIBUTING.md"


def test_exceptions_are_still_there_and_still_large():
    there = {(name, what): too_large(part) for name in SOURCES for part, what in parts(TREES[name])}
    assert all(there.get(exception) for exception in EXCEPTIONS), [
        one for one in EXCEPTIONS if not there.get(one)
    ]


@pytest.mark.parametrize(
    "source, why",
    [
        ("class A:\n" + "    x = 1\n" * 250, "251 lines"),
        ("def f():\n" + "    x = 1\n" * 60, "61 lines"),
        ("def f(self, a, b, c, d, *, e, f, g, h): pass", "8 parameters"),
        ("def f(self, a, b, c, d, *, e, f, g): pass", ""),
    ],
)
def test_sizes_are_measured(source, why):
    ((part, _),) = parts(ast.parse(source))
    assert why in too_large(part) and bool(why) == bool(too_large(part))
