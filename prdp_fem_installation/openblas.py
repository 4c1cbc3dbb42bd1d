"""Which kernels OpenBLAS takes, where it does not know the processor.

OpenBLAS looks for the processor in a list that is as old as it is itself. What is newer, it takes
for a Prescott of 2004, or another of its oldest: slower, and with sums that depend on where an
array lies in memory. ``OPENBLAS_CORETYPE`` names another, for all programs that are started from
then on; NumPy and torch have libraries of their own, which as a rule know the processor.

``install.sh`` has each Python of its environment call :func:`choose` when it starts, before any
library is loaded: on whatever machine it is, in whatever container, and on each rank. It takes a
few milliseconds, and imports no more than a start of Python does.
"""

from __future__ import annotations

import os
from collections.abc import Container

__all__ = ["best_core", "candidates", "choose", "detected_core", "processor"]

_VARIABLE = "OPENBLAS_CORETYPE"
_LIBRARY = "libopenblas.so.0"
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}
_AVX2 = {"avx2", "fma"}
# What the kernels of old cores do without. Those that are not here have AVX2, or are none of x86.
_WITHOUT_SSE4 = {
    "Katmai",
    "Coppermine",
    "Northwood",
    "Prescott",
    "Banias",
    "Atom",
    "Core2",
    "Athlon",
    "Opteron",
    "Opteron_SSE3",
    "Bobcat",
    "Nano",
}
_WITHOUT_AVX = _WITHOUT_SSE4 | {"Penryn", "Dunnington", "Nehalem", "Barcelona"}
_WITHOUT_AVX2 = _WITHOUT_AVX | {"Sandybridge", "Bulldozer", "Piledriver", "Steamroller"}


def processor(path: str = "/proc/cpuinfo") -> tuple[str, set[str]]:
    """The vendor of the first processor, and what it has; empty where the system does not say."""
    vendor, flags = "", set()
    try:
        with open(path) as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "vendor_id":
                    vendor = value.strip()
                elif name.strip() == "flags":
                    flags = set(value.split())
                    break
    except OSError:
        pass
    return vendor, flags


def candidates(core: str, vendor: str, flags: Container[str]) -> list[str]:
    """Cores whose kernels use more of a processor than those of ``core`` do, best first."""
    found = []
    if core in _WITHOUT_AVX2 and all(flag in flags for flag in _AVX2):
        if all(flag in flags for flag in _AVX512):
            found.append("SkylakeX")
        found += ["Zen", "Haswell"] if vendor in ("AuthenticAMD", "HygonGenuine") else ["Haswell"]
    if core in _WITHOUT_AVX and "avx" in flags:
        found.append("Sandybridge")
    if core in _WITHOUT_SSE4 and "sse4_2" in flags:
        found.append("Nehalem")
    return found


def detected_core(asked_for: str | None = None) -> str | None:
    """The core that OpenBLAS takes in a new process, asked for one or none; None where it is
    silent.
    """
    environment = {name: value for name, value in os.environ.items() if name != _VARIABLE}
    environment |= {"LD_PRELOAD": _LIBRARY, "OPENBLAS_VERBOSE": "2", "OPENBLAS_NUM_THREADS": "1"}
    if asked_for is not None:
        environment[_VARIABLE] = asked_for
    ends = os.pipe()
    reader: int | None = ends[0]
    writer: int | None = ends[1]
    try:
        null = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, ends[1], 2)]
        process = os.posix_spawn("/bin/true", ["true"], environment, file_actions=actions)
        os.close(null)
        os.close(ends[1])
        writer = None
        with open(ends[0], errors="replace") as said:
            reader = None
            cores = [line.removeprefix("Core: ") for line in said if line.startswith("Core: ")]
        os.waitpid(process, 0)
    finally:
        for descriptor in (reader, writer):
            if descriptor is not None:
                os.close(descriptor)
    return cores[-1].strip() if cores else None


def best_core(vendor: str, flags: Container[str]) -> str | None:
    """The core to ask OpenBLAS for; None where what it finds itself is not behind, or it has no
    other.
    """
    core = detected_core()
    if core is None:
        return None
    better = candidates(core, vendor, flags)
    return next((candidate for candidate in better if detected_core(candidate) == candidate), None)


def choose() -> None:
    """Have OpenBLAS take the best core, in this process and what it starts, where nobody has named
    one.

    A failure is none of a starting Python's business: OpenBLAS then decides, as it does without
    this.
    """
    if os.environ.get(_VARIABLE):
        return
    try:
        vendor, flags = processor()
        # An empty name is none that OpenBLAS has, and it guesses otherwise than without one.
        core = best_core(vendor, flags) if flags else None
        if core is not None:
            os.environ[_VARIABLE] = core
        else:
            os.environ.pop(_VARIABLE, None)
    except OSError:
        pass
