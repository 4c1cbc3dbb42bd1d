"""Damaged mesh files: each is refused, or gives a mesh that a problem can be solved on.

``python tests/fuzz_meshes.py MINUTES [SEED]`` tries as many as there is time for, and prints how
many there were and what was said of them. What ends it is left in fuzz_meshes.msh.
"""

import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from firedrake import *
from mesh_files import gmsh_file

from prdp_fem.ranks.job import Refused
from prdp_fem.studies import triangle_mesh

DEMOS = Path(__file__).resolve().parent.parent / "demos"
NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"2",
    b"3",
    b"15",
    b"16",
    b"1e308",
    b"-1e308",
    b"1e-320",
    b"nan",
    b"inf",
    b"2147483648",
    b"4294967296",
    b"9223372036854775808",
    b"1" + 400 * b"0",
    b"1_0",
    b"0x10",
    b"1.5",
    b"",
    b"$End",
    b"\xff",
    b"\0",
]
PATIENCE = 60  # seconds for one file


def sources() -> list[bytes]:
    """Small files of each format, in which all numbers matter, and those of the demos."""
    small = [
        gmsh_file(version=version, order=order)
        for version in ("2.2", "4.1")
        for order in ("", "<", ">")
    ]
    return 3 * small + [path.read_bytes() for path in sorted(DEMOS.glob("*/*.msh"))]


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """The file with something else in one place, or in a few."""
    for _ in range(random.integers(1, 4)):
        places = random.integers(0, len(content) + 1, 2)
        low, high = int(places.min()), int(places.max())
        words = list(re.finditer(rb"\S+", content))
        words = words or [re.match(b"", b"")]
        word, other = (words[random.integers(len(words))] for _ in range(2))
        lines = content.split(b"\n")
        line, another = random.integers(0, len(lines), 2)
        match random.choice(
            [
                "bytes",
                "cut",
                "without",
                "twice",
                "number",
                "number",
                "number",
                "word",
                "lines",
                "line twice",
                "no line",
            ]
        ):
            case "bytes":
                new, length = random.bytes(random.integers(1, 9)), random.integers(0, 9)
                content = content[:low] + new + content[low + length :]
            case "cut":
                content = content[:low]
            case "without":
                content = content[:low] + content[high:]
            case "twice":
                content = content[:high] + content[low:]
            case "number":
                number = NUMBERS[random.integers(len(NUMBERS))]
                content = content[: word.start()] + number + content[word.end() :]
            case "word":
                content = content[: word.start()] + other[0] + content[word.end() :]
            case "lines":
                lines[line], lines[another] = lines[another], lines[line]
                content = b"\n".join(lines)
            case "line twice":
                content = b"\n".join([*lines[:line], lines[another], *lines[line:]])
            case "no line":
                content = b"\n".join([*lines[:line], *lines[line + 1 :]])
    return content


def solve_on(mesh) -> None:
    """Raises where a problem has no solution of the mesh's size."""
    V = FunctionSpace(mesh, "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    area = assemble(Constant(1) * dx(domain=mesh))
    u = Function(V)
    solve(
        (w * v + area * inner(grad(w), grad(v))) * dx == v * dx,
        u,
        solver_parameters={"ksp_type": "preonly", "pc_type": "lu"},
    )
    assert area > 0 and abs(u.dat.data_ro - 1).max() < 1e-6, (area, u.dat.data_ro)


def tried(path: Path, seeds: Iterator[int]) -> Iterator[str]:
    """What has become of a damaged file for each seed."""
    contents = sources()
    for seed in seeds:
        random = np.random.default_rng(seed)
        path.write_bytes(damaged(contents[random.integers(len(contents))], random))
        try:
            mesh = triangle_mesh(path, COMM_SELF)
        except Refused as error:
            begin = f"{path} is not a mesh that can be used: "
            assert str(error).startswith(begin), error
            assert "\n" not in str(error) and len(str(error)) < len(begin) + 200, error
            yield re.sub(r"'.*'|\(.*\)|[-+]?\d[-+.e\d]*", "…", str(error)[len(begin) :])
        else:
            solve_on(mesh)
            yield "taken"


def main() -> None:
    """The command that the module's docstring names."""
    end = time.monotonic() + 60 * float(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found = Counter()
    path = Path("fuzz_meshes.msh")

    def seeds():
        seed = first
        while time.monotonic() < end:
            signal.alarm(PATIENCE)  # ends the process where a file takes longer
            yield seed
            seed += 1

    for outcome in tried(path, seeds()):
        found[outcome] += 1
    path.unlink()
    print(f"{found.total()} files from seed {first} on:")
    for outcome, count in found.most_common():
        print(f"{count:8}  {outcome}")


if __name__ == "__main__":
    main()
