"""Files of Gmsh, written for tests: format 2.2 or 4.1, text or binary."""

import struct

SQUARE = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
TRIANGLES = [(1, 2, 3), (1, 3, 4)]
LINES = {1: [(1, 2), (2, 3)], 2: [(3, 4), (4, 1)]}  # by physical group


def gmsh_file(
    points=SQUARE, triangles=TRIANGLES, lines=LINES, *, version="2.2", order="", tags=None, kind=2
) -> bytes:
    """The content of a file.

    Parameters
    ----------
    points : list of tuple of float
    triangles : list of tuple of int
        Their nodes, counted from 1, or other elements of Gmsh's number ``kind``.
    lines : dict of int to list of tuple of int
        By physical group.
    version : str
    order : str
        Of bytes in a binary file, ``"<"`` or ``">"``; empty for text.
    tags : list of int or None
        What nodes are called, where it is not 1, 2, ...
    """
    tags = tags or range(1, len(points) + 1)

    def numbers(form, *values):
        if order:
            return struct.pack(order + form, *values)
        return " ".join(map(str, values)).encode() + b"\n"

    def block(form, rows):
        return b"".join(numbers(form, *row) for row in rows)

    header = f"{version} {bool(order):d} 8\n".encode()
    if order:
        header += numbers("i", 1) + b"\n"
    blocks = [(1, mark, 1, some) for mark, some in lines.items()] + [(2, 3, kind, triangles)]
    count = sum(len(elements) for *_, elements in blocks)
    if version == "2.2":
        nodes = f"{len(points)}\n".encode()
        nodes += block("i3d", [(tag, *point) for tag, point in zip(tags, points)])
        elements = f"{count}\n".encode()
        for _, mark, kind, some in blocks:
            for number, element in enumerate(some, 1):
                start = (kind, 1, 2, number) if order else (number, kind, 2)
                row = *start, mark, mark, *element
                elements += numbers(f"{len(row)}i", *row)
        sections = {"Nodes": nodes, "Elements": elements}
    else:
        entities = numbers("4Q", 0, len(lines), 1, 0)
        entities += block("i6dQiQ", [(entity, *6 * [0.0], 1, entity, 0) for entity in (*lines, 3)])
        nodes = numbers("4Q", 1, len(points), min(tags, default=1), max(tags, default=1))
        nodes += numbers("3iQ", 2, 3, 0, len(points))
        nodes += block("Q", [[tag] for tag in tags]) + block("3d", points)
        elements = numbers("4Q", len(blocks), count, 1, count)
        for dimension, entity, kind, some in blocks:
            elements += numbers("3iQ", dimension, entity, kind, len(some))
            for number, element in enumerate(some, 1):
                elements += numbers(f"{1 + len(element)}Q", number, *element)
        sections = {"Entities": entities, "Nodes": nodes, "Elements": elements}
    content = b"$MeshFormat\n" + header + b"$EndMeshFormat\n"
    for name, section in sections.items():
        end = b"\n" if order else b""
        content += f"${name}\n".encode() + section + end + f"$End{name}\n".encode()
    return content
