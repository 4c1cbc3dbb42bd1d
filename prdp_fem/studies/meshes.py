"""Plane meshes of triangles from files of Gmsh.

A damaged file, and a mesh that no problem can be solved on, is refused in a sentence that names the
file and what is wrong with it. PETSc's reader takes numbers of nodes, and how many there are of
anything, as the file has them, and a wrong one ends the process. So the file is read here, and what
PETSc is given are arrays that have been checked.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from firedrake import Mesh
from firedrake.mesh import MeshGeometry, plex_from_cell_list
from mpi4py import MPI

from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.ranks.job import Refused

__all__ = ["triangle_mesh"]

# Gmsh's numbers of elements that a plane mesh of straight triangles may have, and how many nodes
# each of them has.
_POINT = 15
_LINE = 1
_TRIANGLE = 2
_NODES = {_POINT: 1, _LINE: 2, _TRIANGLE: 3}
_OTHERS = {
    3: "quadrangles",
    4: "tetrahedra",
    5: "hexahedra",
    6: "prisms",
    7: "pyramids",
    8: "curved lines",
    9: "curved triangles",
}
# Heights below this, relative to lengths, are none.
_SMALL = 1e-8


def triangle_mesh(path: Path, comm: MPI.Comm, *, marks: Collection[int] = ()) -> MeshGeometry:
    """The mesh in a file of Gmsh's, of format 2.2 or 4.1, text or binary.

    Parameters
    ----------
    path : Path
        Read by the first rank.
    comm : mpi4py.MPI.Comm
        On which this is collective, and the mesh will be.
    marks : collection of int
        Physical groups that its boundary must have.

    Returns
    -------
    firedrake.Mesh
        Its boundary is marked by physical groups, as by Firedrake's own reader.

    Raises
    ------
    Refused
        Where the file cannot be read, or does not hold a plane mesh of straight triangles that a
        problem can be solved on.
    """
    parts: _Parts | None = None  # on other ranks

    def read():
        nonlocal parts
        try:
            parts = _parts(_sections(path.read_bytes()))
            parts.check(marks)
        except OSError as error:
            raise Refused(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise Refused(f"{path} is not a mesh that can be used: {error}") from None

    from_first_rank(comm, read)
    triangles, points = (parts.triangles, parts.points[:, :2]) if parts else (None, None)
    plex = plex_from_cell_list(2, triangles, points, comm, name="plane")
    plex.createLabel("Face Sets")
    if parts:
        first_vertex, _ = plex.getDepthStratum(0)
        for line, mark in zip(parts.lines[parts.marks != 0], parts.marks[parts.marks != 0]):
            (facet,) = plex.getJoin((first_vertex + line).tolist())
            plex.setLabelValue("Face Sets", facet, mark)
    return Mesh(plex, comm=comm)


@dataclass
class _Parts:
    """What a file holds, with nodes counted from 0 in their order in the file.

    Attributes
    ----------
    tags : numpy.ndarray
        What the file calls its nodes.
    points : numpy.ndarray
        Their coordinates, shape (nodes, 3).
    lines, triangles : numpy.ndarray
        Their nodes, shape (elements, 2) and (elements, 3).
    marks : numpy.ndarray
        The physical group of each line, 0 where it has none.
    """

    tags: np.ndarray
    points: np.ndarray
    lines: np.ndarray
    triangles: np.ndarray
    marks: np.ndarray

    def check(self, marks: Collection[int]) -> None:
        """Raise a ValueError that says what keeps a problem from being solved on it."""
        if not len(self.triangles):
            raise ValueError("it has no triangles")
        if len(wrong := np.flatnonzero(~np.isfinite(self.points).all(axis=1))):
            point = tuple(self.points[wrong[0]].tolist())
            raise ValueError(f"node {self.tags[wrong[0]]} is at {point}")
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        size = (high / 2 - low / 2).max() * 2
        if low.tolist() == high.tolist():
            raise ValueError(f"all its {len(self.points)} nodes are at one point")
        if not 1e-100 < size < 1e100:
            raise ValueError(f"its size is {size:.1e}, with which double precision cannot compute")
        if high[2] - low[2] > _SMALL * size:
            raise ValueError("it does not lie in a plane of constant z")
        x = (self.points - low)[:, :2] / size
        self._check_nodes(x)
        self._check_triangles(x)
        if len(wrong := self.marks[abs(self.marks) >= 2**31]):
            raise ValueError(
                f"a part of its boundary is in physical group {wrong[0]}, which is none"
            )
        if missing := sorted(set(marks) - set(self.marks.tolist())):
            raise ValueError(f"no part of its boundary is in physical group {missing[0]}")

    def _check_nodes(self, x: np.ndarray) -> None:
        """Each belongs to a triangle, and no two are at one point."""
        used = np.bincount(self.triangles.ravel(), minlength=len(x)) > 0
        if not used.all():
            raise ValueError(f"node {self.tags[np.argmin(used)]} belongs to no triangle")
        _, first, group = np.unique(x.round(12), axis=0, return_index=True, return_inverse=True)
        if len(first) < len(x):
            first = first[group.ravel()]
            second = np.flatnonzero(first != np.arange(len(x)))[0]
            raise ValueError(f"{self._named([first[second], second])} are at one point")

    def _check_triangles(self, x: np.ndarray) -> None:
        """None is flat, they lie side by side, and lines are edges of theirs."""
        corners = x[self.triangles]
        sides = np.roll(corners, -1, axis=1) - corners
        longest = (sides**2).sum(axis=-1).max(axis=1)
        areas = sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0]
        if len(flat := np.flatnonzero(~(abs(areas) > _SMALL * longest))):
            raise ValueError(f"the triangle of {self._named(self.triangles[flat[0]])} is flat")
        ordered, counts = np.unique(np.sort(self.triangles, axis=1), axis=0, return_counts=True)
        if (counts > 1).any():
            doubled = self._named(ordered[np.argmax(counts)])
            raise ValueError(f"the triangle of {doubled} is there {counts.max()} times")
        # An edge seen from its node of the lower number: a triangle lies on its left or right.
        starts, ends = self.triangles, np.roll(self.triangles, -1, axis=1)
        on_left = (starts < ends) == (areas > 0)[:, None]
        pairs = np.sort(np.stack([starts, ends], axis=-1).reshape(-1, 2), axis=1)
        edges, which = np.unique(pairs, axis=0, return_inverse=True)
        left, right = (
            np.bincount(which.ravel()[side.ravel()], minlength=len(edges))
            for side in (on_left, ~on_left)
        )
        both, larger = left + right, np.maximum(left, right)
        if both.max() > 2:
            crowded = self._named(edges[np.argmax(both)])
            raise ValueError(f"the edge of {crowded} belongs to {both.max()} triangles")
        if larger.max() > 1:
            folded = self._named(edges[np.argmax(larger)])
            raise ValueError(f"the two triangles at the edge of {folded} overlap")
        known = set(map(tuple, edges.tolist()))
        for line in np.sort(self.lines, axis=1).tolist():
            if tuple(line) not in known:
                raise ValueError(
                    f"the line between {self._named(line)} is not an edge of a triangle"
                )

    def _named(self, nodes) -> str:
        *others, last = (str(self.tags[node]) for node in nodes)
        return f"nodes {', '.join(others)} and {last}"


def _sections(content: bytes) -> dict[str, bytes]:
    """What stands between $Name and $EndName, by the name."""
    if not content.startswith(b"$MeshFormat"):
        raise ValueError(
            "it does not begin with $MeshFormat, as files of Gmsh do" if content else "it is empty"
        )
    found: dict[str, bytes] = {}
    position = 0
    begin = re.compile(rb"\s*\$([A-Za-z]+)[^\S\n]*\n")
    while match := begin.match(content, position):
        name = match[1]
        end = content.find(b"$End" + name, match.end())
        if end < 0:
            raise ValueError(f"it ends within ${name.decode()}")
        if name.decode() in found and name != b"Comments":
            raise ValueError(f"it has ${name.decode()} twice")
        found[name.decode()] = content[match.end() : end]
        position = end + len(b"$End" + name)
    if rest := content[position:].strip():
        raise ValueError(f"{rest[:20]!r} is in the place of a section")
    return found


def _parts(sections: dict[str, bytes]) -> _Parts:
    """What the sections of a file hold."""
    header, _, rest = sections["MeshFormat"].partition(b"\n")
    words = header.decode(errors="replace").split()
    if not re.fullmatch("(2.2|4.1) [01] [48]", " ".join(words)):
        raise ValueError(
            f"its format is {' '.join(words)[:20]!r}, where 2.2 and 4.1 can be read: "
            "have Gmsh write it again"
        )
    order = ""
    if words[1] == "1":
        order = {b"\x01\0\0\0": "<", b"\0\0\0\x01": ">"}.get(rest[:4], "")
        if not order:
            raise ValueError("it is said to be binary, and does not begin as binary files do")
    if "Periodic" in sections:
        raise ValueError(
            "parts of its boundary are identified with each other ($Periodic), which "
            "no demo expects"
        )
    if missing := [name for name in ("Nodes", "Elements") if name not in sections]:
        raise ValueError(f"it has no ${missing[0]}")
    is_old = words[0] == "2.2"

    def numbers(name):
        content = sections[name]
        if is_old and order:  # numbers of nodes and elements are text
            count, _, content = content.partition(b"\n")
            return _Numbers(name, count).counts()[0], _Numbers(name, content, order)
        found = _Numbers(name, content, order, int(words[2]))
        return found.counts()[0] if is_old else 0, found

    count, found = numbers("Nodes")
    tags, points = _old_nodes(count, found) if is_old else _nodes(found)
    found.end()
    index = {tag: number for number, tag in enumerate(tags)}
    if len(index) < len(tags):
        raise ValueError("two nodes have the same number")
    groups = None
    if "Entities" in sections and not is_old:
        _, found = numbers("Entities")
        groups = _groups(found)
        found.end()
    count, found = numbers("Elements")
    elements = list(
        _old_elements(count, found, bool(order)) if is_old else _elements(found, groups)
    )
    found.end()
    by_kind: dict[int, list] = {kind: [] for kind in _NODES}
    for kind, corners, mark in elements:
        if unknown := [node for node in corners if node not in index]:
            raise ValueError(f"an element has node {unknown[0]}, which is not there")
        by_kind[kind].append(([index[node] for node in corners], mark))
    lines, triangles = (
        np.array([corners for corners, _ in by_kind[kind]], dtype=int).reshape(-1, _NODES[kind])
        for kind in (_LINE, _TRIANGLE)
    )
    marks = np.array([mark for _, mark in by_kind[_LINE]], dtype=int)
    return _Parts(np.array(tags), np.array(points).reshape(-1, 3), lines, triangles, marks)


def _number_of_nodes(kind: int) -> int:
    if kind not in _NODES:
        name = _OTHERS.get(kind, f"elements of kind {kind}")
        raise ValueError(f"it has {name}, where straight triangles are expected")
    return _NODES[kind]


def _old_nodes(count: int, found: _Numbers) -> tuple[list[int], list[list[float]]]:
    """Numbers and coordinates of nodes, format 2.2."""
    rows = [(found.whole(1)[0], found.real(3)) for _ in range(count)]
    return [tag for tag, _ in rows], [point for _, point in rows]


def _nodes(found: _Numbers) -> tuple[list[int], list[list[float]]]:
    """The same, format 4.1."""
    tags, points = [], []
    blocks, count, _, _ = found.counts(4)
    for _ in range(blocks):
        dimension, _, has_parameters = found.whole(3)
        (size,) = found.counts()
        tags += found.whole(size, wide=True)
        # Where a node is on a curve or a surface is said by the geometry's parameters, too.
        length = 3 + (dimension if has_parameters and dimension in (1, 2, 3) else 0)
        points += [found.real(length)[:3] for _ in range(size)]
    if len(tags) != count:
        raise ValueError(f"it has {len(tags)} nodes, and says that it has {count}")
    return tags, points


def _groups(found: _Numbers) -> dict[tuple[int, int], int]:
    """The first physical group of each part of the geometry, by its dimension and number.

    It is 0 where there is none.
    """
    first = {}
    for dimension, count in enumerate(found.counts(4)):
        for _ in range(count):
            (entity,) = found.whole(1)
            found.real(3 if dimension == 0 else 6)  # a box around it
            groups = found.whole(found.counts()[0])
            first[dimension, entity] = groups[0] if groups else 0
            if dimension > 0:
                found.whole(found.counts()[0])  # what bounds it
    return first


def _old_elements(
    count: int, found: _Numbers, is_binary: bool
) -> Iterator[tuple[int, list[int], int]]:
    """Kind, nodes and physical group of elements, format 2.2."""
    while count > 0:
        if is_binary:
            kind, size, groups = found.whole(3)
        else:
            (_, kind, groups), size = found.whole(3), 1
        nodes = _number_of_nodes(kind)
        if not 1 <= size <= count or groups < 0:
            raise ValueError("in $Elements is a number of groups, or of elements, that cannot be")
        for _ in range(size):
            row = found.whole(is_binary + groups + nodes)[is_binary:]
            yield kind, row[groups:], row[0] if groups else 0
        count -= size


def _elements(
    found: _Numbers, groups: dict[tuple[int, int], int] | None
) -> Iterator[tuple[int, list[int], int]]:
    """The same, format 4.1."""
    blocks, count, _, _ = found.counts(4)
    for _ in range(blocks):
        dimension, entity, kind = found.whole(3)
        nodes = _number_of_nodes(kind)
        if groups is not None and (dimension, entity) not in groups:
            raise ValueError(
                f"elements belong to entity {entity} of dimension {dimension}, which is not there"
            )
        (size,) = found.counts()
        count -= size
        group = 0 if groups is None else groups[dimension, entity]
        for _ in range(size):
            yield kind, found.whole(1 + nodes, wide=True)[1:], group
    if count != 0:
        raise ValueError("$Elements holds another number of elements than it says")


class _Numbers:
    """The numbers of a section, one after the other.

    Parameters
    ----------
    name : str
        Of the section.
    content : bytes
    order : str
        Of bytes in a binary file, ``"<"`` or ``">"``; empty for text.
    wide : int
        How many bytes a number has in a binary file that counts something, or names a node or an
        element.
    """

    def __init__(self, name: str, content: bytes, order: str = "", wide: int = 4):
        self._name = name
        self._order = order
        self._wide = wide
        self._items = content if order else content.split()
        self._position = 0

    def whole(self, count: int, *, wide: bool = False) -> list[int]:
        """So many whole numbers, ``wide`` ones or others."""
        if self._order:
            return self._unpacked(f"i{self._wide if wide else 4}", count).tolist()
        return [self._converted(word, int) for word in self._taken(count)]

    def real(self, count: int) -> list[float]:
        """So many real numbers."""
        if self._order:
            return self._unpacked("f8", count).tolist()
        return [self._converted(word, float) for word in self._taken(count)]

    def counts(self, count: int = 1) -> list[int]:
        """So many numbers of something."""
        found = self.whole(count, wide=True)
        if min(found) < 0:
            raise ValueError(f"there is a number of {min(found)} in ${self._name}")
        return found

    def end(self) -> None:
        """No number is left."""
        left = self._items[self._position :]
        if left.strip() if isinstance(left, bytes) else left:
            raise ValueError(f"${self._name} holds more than it says")

    def _taken(self, count: int):
        taken = self._items[self._position : self._position + count]
        if len(taken) < count:
            raise ValueError(f"${self._name} holds less than it says")
        self._position += count
        return taken

    def _unpacked(self, kind: str, count: int) -> np.ndarray:
        return np.frombuffer(self._taken(count * int(kind[1:])), dtype=self._order + kind)

    def _converted(self, word: bytes, kind: type):
        # Python would read an underscore between digits.
        with contextlib.suppress(ValueError):
            if b"_" not in word and (abs(number := kind(word)) < 2**63 or kind is float):
                return number
        expected = "whole number" if kind is int else "number"
        raise ValueError(
            f"{word.decode(errors='replace')[:20]!r} in ${self._name} is not a {expected}"
        )
