"""Mesh files: read as Firedrake reads them, or refused where nothing can be solved on them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from firedrake import *
from fuzz_meshes import tried
from jobs import run_ranks
from mesh_files import LINES, SQUARE, TRIANGLES, gmsh_file

from prdp_fem.ranks.job import Refused
from prdp_fem.studies import triangle_mesh

DEMOS = Path(__file__).resolve().parent.parent / "demos"
OURS = sorted(DEMOS.glob("*/*.msh"))


def same(mesh, other):
    """The same nodes and triangles, and boundaries of equal lengths."""
    marks = other.exterior_facets.unique_markers
    return (
        np.array_equal(mesh.coordinates.dat.data_ro, other.coordinates.dat.data_ro)
        and np.array_equal(
            mesh.coordinates.cell_node_map().values, other.coordinates.cell_node_map().values
        )
        and np.array_equal(mesh.exterior_facets.unique_markers, marks)
        and all(
            assemble(Constant(1) * ds(int(mark), domain=mesh))
            == assemble(Constant(1) * ds(int(mark), domain=other))
            for mark in marks
        )
    )


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_meshes_are_those_that_firedrake_reads(path):
    assert same(triangle_mesh(path, COMM_WORLD), Mesh(str(path)))


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_ranks_share_a_mesh(path):
    mesh, other = triangle_mesh(path, COMM_WORLD), Mesh(str(path))
    assert COMM_WORLD.allreduce(mesh.cell_set.size) == COMM_WORLD.allreduce(other.cell_set.size)
    for measure in (dx, *(ds(int(mark)) for mark in other.exterior_facets.unique_markers)):
        mine, theirs = (assemble(Constant(1) * measure(domain=some)) for some in (mesh, other))
        assert mine == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("order", ["", "<", ">"], ids=["text", "little", "big"])
@pytest.mark.parametrize("version", ["2.2", "4.1"])
@pytest.mark.parametrize("tags", [None, [7, 1000, 3, 50]], ids=["in order", "sparse"])
def test_all_formats_are_those_that_firedrake_reads(tmp_path, version, order, tags):
    path = tmp_path / "square.msh"
    named = {"triangles": TRIANGLES, "lines": LINES}
    if tags:
        named = {
            "triangles": [tuple(tags[node - 1] for node in nodes) for nodes in TRIANGLES],
            "lines": {
                mark: [tuple(tags[node - 1] for node in nodes) for nodes in some]
                for mark, some in LINES.items()
            },
        }
    path.write_bytes(gmsh_file(version=version, order=order, tags=tags, **named))
    mesh = triangle_mesh(path, COMM_SELF, marks=[1, 2])
    assert same(mesh, Mesh(str(path), comm=COMM_SELF))
    assert assemble(Constant(1) * ds(2, domain=mesh)) == 2


def test_windows_line_ends_comments_and_other_sections_do_not_matter(tmp_path):
    path = tmp_path / "square.msh"
    others = b'$Comments\nmine\n$EndComments\n$PhysicalNames\n1\n1 1 "a"\n$EndPhysicalNames\n'
    content = gmsh_file().replace(b"$Nodes", others + b"$Nodes")
    path.write_bytes((content + b"$NodeData\nanything\n$EndNodeData\n").replace(b"\n", b"\r\n"))
    assert assemble(Constant(1) * dx(domain=triangle_mesh(path, COMM_SELF))) == pytest.approx(1)


def square(**others):
    return {"points": SQUARE, "triangles": TRIANGLES, "lines": LINES, **others}


def moved(node, *point):
    return [point if number == node else old for number, old in enumerate(SQUARE, 1)]


CENTRE = [*SQUARE, (0.5, 0.5, 0)]
SENSELESS = {
    "a node that is missing": (
        square(triangles=[(1, 2, 9), (1, 3, 4)]),
        "an element has node 9, which is not there",
    ),
    "a boundary node that is missing": (
        square(lines={1: [(1, 7)]}),
        "an element has node 7, which is not there",
    ),
    "node 0": (
        square(triangles=[(0, 1, 2), (1, 3, 4)]),
        "an element has node 0, which is not there",
    ),
    "points equal": (square(points=[(0.5, 0.5, 0)] * 4), "all its 4 nodes are at one point"),
    "two points equal": (
        square(points=[*SQUARE, (1, 0, 0)], triangles=[*TRIANGLES, (2, 5, 3)]),
        "nodes 2 and 5 are at one point",
    ),
    "a triangle doubled": (
        square(triangles=[*TRIANGLES, (3, 1, 2)]),
        "the triangle of nodes 1, 2 and 3 is there 2 times",
    ),
    "all triangles doubled": (square(triangles=2 * TRIANGLES), "is there 2 times"),
    "the mesh doubled": (
        square(points=2 * SQUARE, triangles=[*TRIANGLES, (5, 6, 7), (5, 7, 8)]),
        "nodes 1 and 5 are at one point",
    ),
    "three at an edge": (
        square(points=[*SQUARE, (0.5, 2, 0)], triangles=[*TRIANGLES, (1, 3, 5)]),
        "the edge of nodes 1 and 3 belongs to 3 triangles",
    ),
    "folded": (
        square(points=moved(4, 0.9, 0.1, 0)),
        "the two triangles at the edge of nodes 1 and 3 overlap",
    ),
    "nan": (square(points=moved(2, math.nan, 0, 0)), r"node 2 is at \(nan, 0.0, 0.0\)"),
    "infinite": (square(points=moved(2, 0, math.inf, 0)), r"node 2 is at \(0.0, inf, 0.0\)"),
    "z is nan": (square(points=moved(2, 1, 0, math.nan)), r"node 2 is at \(1.0, 0.0, nan\)"),
    "large": (
        square(points=[(1e300 * x, 1e300 * y, z) for x, y, z in SQUARE]),
        "its size is 1.0e[+]300",
    ),
    "small": (
        square(points=[(1e-300 * x, 1e-300 * y, z) for x, y, z in SQUARE]),
        "its size is 1.0e-300",
    ),
    "no triangles": (square(triangles=[]), "it has no triangles"),
    "no cells at all": (square(triangles=[], lines={}), "it has no triangles"),
    "no nodes": (square(points=[], triangles=[], lines={}), "it has no triangles"),
    "a triangle without height": (
        square(points=[*SQUARE, (0.5, 0, 0)], triangles=[*TRIANGLES, (1, 2, 5)]),
        "the triangle of nodes 1, 2 and 5 is flat",
    ),
    "a triangle of one node": (
        square(triangles=[*TRIANGLES, (1, 1, 1)]),
        "the triangle of nodes 1, 1 and 1 is flat",
    ),
    "nearly flat": (square(points=moved(4, 0.5, 0.5 + 1e-12, 0)), "is flat"),
    "tetrahedra": (
        square(triangles=[(1, 2, 3, 4)], kind=4),
        "it has tetrahedra, where straight triangles are expected",
    ),
    "flat tetrahedra": (
        square(points=[(0, 0, 0)] * 4, triangles=[(1, 2, 3, 4)], kind=4),
        "it has tetrahedra",
    ),
    "quadrangles": (square(triangles=[(1, 2, 3, 4)], kind=3), "it has quadrangles"),
    "curved": (square(triangles=[(1, 2, 3, 4, 1, 2)], kind=9), "it has curved triangles"),
    "a kind that there is not": (square(kind=77), "it has elements of kind 77"),
    "not plane": (square(points=moved(3, 1, 1, 0.5)), "it does not lie in a plane of constant z"),
    "upright": (
        square(points=[(x, 0, y) for x, y, _ in SQUARE]),
        "it does not lie in a plane of constant z",
    ),
    "a node of no triangle": (square(points=CENTRE), "node 5 belongs to no triangle"),
    "a node of the boundary only": (
        square(points=CENTRE, lines={1: [(1, 5)]}),
        "node 5 belongs to no triangle",
    ),
    "a line across": (
        square(lines={1: [(2, 4)]}),
        "the line between nodes 2 and 4 is not an edge of a triangle",
    ),
    "a node twice": (square(tags=[1, 2, 3, 3]), "two nodes have the same number"),
    "a part of the boundary missing": (
        square(lines={2: LINES[2]}),
        "no part of its boundary is in physical group 1",
    ),
}


@pytest.mark.parametrize(("mesh", "message"), SENSELESS.values(), ids=SENSELESS.keys())
@pytest.mark.parametrize(
    ("version", "order"), [("2.2", ""), ("4.1", ""), ("4.1", "<")], ids=["2.2", "4.1", "binary"]
)
def test_meshes_that_nothing_can_be_solved_on_are_refused(tmp_path, mesh, message, version, order):
    path = tmp_path / "senseless.msh"
    path.write_bytes(gmsh_file(version=version, order=order, **mesh))
    with pytest.raises(
        Refused, match=f"^{path} is not a mesh that can be used: .*{message}"
    ) as refused:
        triangle_mesh(path, COMM_SELF, marks=[1])
    assert "\n" not in str(refused.value)


TEXT, BINARY = gmsh_file(), gmsh_file(version="4.1", order="<")
DAMAGED = {
    "empty": (b"", "it is empty"),
    "garbage": (bytes(range(256)) * 40, "it does not begin with .MeshFormat"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(1000), "it does not begin with .MeshFormat"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "it does not begin with .MeshFormat",
    ),
    "the header alone": (TEXT[:30], "it ends within .MeshFormat"),
    "cut in its nodes": (TEXT[: TEXT.index(b"$EndNodes") - 9], "it ends within .Nodes"),
    "cut in its elements": (TEXT[:-20], "it ends within .Elements"),
    "binary, cut": (BINARY[:-30], "it ends within .Elements"),
    "binary, shorter": (
        BINARY.replace(b"\n$EndElements", b"$EndElements")[:-40] + b"$EndElements",
        "holds less than it says",
    ),
    "version 1": (
        TEXT.replace(b"2.2 0 8", b"1 0 8"),
        "its format is '1 0 8', where 2.2 and 4.1 can be read",
    ),
    "version 3": (TEXT.replace(b"2.2 0 8", b"3 0 8"), "its format is '3 0 8'"),
    "version 4.0": (TEXT.replace(b"2.2 0 8", b"4 0 8"), "its format is '4 0 8'"),
    "version 5": (TEXT.replace(b"2.2 0 8", b"5.0 0 8"), "its format is '5.0 0 8'"),
    "another version": (TEXT.replace(b"2.2 0 8", b"4.1 0 8"), "in .Nodes|.Nodes holds"),
    "text said to be binary": (
        TEXT.replace(b"2.2 0 8", b"2.2 1 8"),
        "does not begin as binary files do",
    ),
    "binary said to be text": (
        BINARY.replace(b"4.1 1 8", b"4.1 0 8"),
        "is not a whole number|holds",
    ),
    "more nodes than it says": (
        TEXT.replace(b"$Nodes\n4", b"$Nodes\n3"),
        ".Nodes holds more than it says",
    ),
    "fewer nodes than it says": (
        TEXT.replace(b"$Nodes\n4", b"$Nodes\n5"),
        ".Nodes holds less than it says",
    ),
    "very many nodes": (
        TEXT.replace(b"$Nodes\n4", b"$Nodes\n999999999999"),
        ".Nodes holds less than it says",
    ),
    "a number of nodes below 0": (
        TEXT.replace(b"$Nodes\n4", b"$Nodes\n-4"),
        "there is a number of -4 in .Nodes",
    ),
    "more nodes than there can be": (
        TEXT.replace(b"$Nodes\n4", b"$Nodes\n" + b"9" * 30),
        "is not a whole number",
    ),
    "elements missing": (TEXT[: TEXT.index(b"$Elements")], "it has no .Elements"),
    "nodes missing": (
        TEXT[: TEXT.index(b"$Nodes")] + TEXT[TEXT.index(b"$Elements") :],
        "it has no .Nodes",
    ),
    "nodes twice": (TEXT + TEXT[TEXT.index(b"$Nodes") :], "it has .Nodes twice"),
    "a word for a number": (
        TEXT.replace(b"2 1 0 0\n", b"2 one 0 0\n"),
        "'one' in .Nodes is not a number",
    ),
    "a comma for a point": (
        TEXT.replace(b"2 1 0 0\n", b"2 1,0 0 0\n"),
        "'1,0' in .Nodes is not a number",
    ),
    "a fraction for a node": (
        TEXT.replace(b"3 3 1 2 3\n", b"3 3 1 2 2.5\n"),
        "'2.5' in .Elements is not a whole number",
    ),
    "a group that is none": (
        TEXT.replace(b" 1 2 1 1 ", b" 1 2 99999999999 1 "),
        "is in physical group 99999999999, which is none",
    ),
    "groups below 0": (TEXT.replace(b" 2 2 3 3 ", b" 2 -2 3 3 "), "a number of groups"),
    "periodic": (TEXT + b"$Periodic\n0\n$EndPeriodic\n", "identified with each other"),
    "something behind": (TEXT + b"anything", "in the place of a section"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "damaged.msh"
    path.write_bytes(content)
    with pytest.raises(
        Refused, match=f"^{path} is not a mesh that can be used: .*({message})"
    ) as refused:
        triangle_mesh(path, COMM_SELF)
    assert "\n" not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path):
    for path, message in [
        (tmp_path / "nothing.msh", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (Path("/proc/self/mem"), "Input/output error"),
    ]:
        with pytest.raises(Refused, match=f"^{path} cannot be read: {message}$"):
            triangle_mesh(path, COMM_SELF)


@pytest.mark.parallel([1, 2, 3])
def test_a_mesh_is_refused_on_all_ranks(tmp_path):
    path = tmp_path / "damaged.msh"
    path.write_bytes(TEXT[:-20])
    with pytest.raises(Refused, match="is not a mesh that can be used: it ends within .Elements"):
        triangle_mesh(path, COMM_WORLD)


@pytest.mark.slow
def test_files_with_other_damages_are_refused_or_can_be_solved_on(tmp_path):
    """Some hundreds of them; fuzz_meshes.py is for more."""
    assert len(list(tried(tmp_path / "damaged.msh", range(300)))) == 300


HEAT = DEMOS / "heat_emulator" / "heat_emulator.py"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_demo_ends_before_its_work(tmp_path, ranks):
    (tmp_path / "damaged.msh").write_bytes(gmsh_file(**SENSELESS["folded"][0]))
    script = f"import runpy\nrunpy.run_path({str(HEAT)!r}, run_name='__main__')"
    job = run_ranks(
        ranks,
        script,
        "--mesh",
        str(tmp_path / "damaged.msh"),
        "--output",
        str(tmp_path / "out"),
        "--quick",
    )
    said = f"{tmp_path / 'damaged.msh'} is not a mesh that can be used: the two triangles"
    assert job.status == 1 and job.output.count(said) == 1
    assert "Traceback" not in job.output and "epochs" not in job.output
    assert not list((tmp_path / "out").iterdir())


def test_a_demo_with_a_mesh_of_its_own_says_what_is_wrong_with_it(tmp_path):
    """A checkout in which a file has become another one."""
    script = tmp_path / "autoregressive_emulator.py"
    script.write_text((DEMOS / "autoregressive_emulator" / script.name).read_text())
    (tmp_path / "lake.msh").write_text("version https://git-lfs.github.com/spec/v1\n")
    result = subprocess.run(
        [sys.executable, script, "--quick"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'lake.msh'} is not a mesh that can be used")
    assert result.returncode == 1 and "Traceback" not in result.stderr
