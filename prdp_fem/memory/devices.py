"""The devices that PETSc can keep matrices and vectors on, beside the host."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.arguments import instance, shown
from prdp_fem.krylov.petsc_errors import what_went_wrong
from prdp_fem.ranks.agreement import agree

__all__ = [
    "AUTO",
    "DEVICES",
    "HOST",
    "Device",
    "failure",
    "find_device",
    "is_built_for",
    "transfers",
    "usable_devices",
]

HOST, AUTO = "cpu", "auto"


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes
    ----------
    name : str
        What ``device=`` and ``-prdp_device`` call it.
    mat_type, vec_type : str
        PETSc's types of sparse matrices and vectors on it.
    package : str
        What PETSc calls the package that it needs for them.
    tensors : str
        Where torch has the tensors that such a solver takes: "cuda" also for HIP, and "cpu" for
        devices that torch does not know, whose solvers copy them.
    """

    name: str
    mat_type: str
    vec_type: str
    package: str
    tensors: str


_ALL = (
    Device("cuda", "aijcusparse", "cuda", "cuda", "cuda"),
    Device("hip", "aijhipsparse", "hip", "hip", "cuda"),
    Device("kokkos", "aijkokkos", "kokkos", "kokkos-kernels", "cpu"),
    Device("opencl", "aijviennacl", "viennacl", "viennacl", "cpu"),
)
DEVICES = {device.name: device for device in _ALL}


def is_built_for(device: Device) -> bool:
    """Whether PETSc has the types of a device."""
    return PETSc.Sys.hasExternalPackage(device.package)


@cache
def failure(device: Device) -> str | None:
    """Why a device cannot be used in this process, and what to do; None where it can."""
    if not is_built_for(device):
        built = [other.name for other in filter(is_built_for, DEVICES.values())]
        built_for = f"for {', '.join(built)}" if built else "for no device"
        return (
            f"this PETSc was built without {device.package} ({built_for}): install one as"
            " docs/gpu.md says, or use device='cpu'"
        )
    try:
        if device.name == "opencl":
            _look_for_platforms()
        else:
            _leave_ghosts_to_the_host()
            kind: Any = {"cuda": PETSc.Device.Type.CUDA, "hip": PETSc.Device.Type.HIP}.get(
                device.name, PETSc.Device.Type.DEFAULT
            )
            PETSc.Device.create(kind).destroy()
    except (PETSc.Error, OSError) as error:
        return (
            f"PETSc was built for it, and finds none ({what_went_wrong(error)}): look at the"
            " driver, or use device='cpu'"
        )
    return None


def _leave_ghosts_to_the_host() -> None:
    """Have PETSc send no memory of a device, unless MPI knows of devices or an option says so: it
    would end the process otherwise.
    """
    if PETSc.Options().hasName("use_gpu_aware_mpi"):
        return
    library = ctypes.CDLL(PETSc.__file__)
    queries = (
        getattr(library, name, None)
        for name in ("MPIX_Query_cuda_support", "MPIX_Query_rocm_support")
    )
    if not any(query is not None and query() for query in queries):
        # a PetscBool, of one byte or, little end first, more
        ctypes.c_ubyte.in_dll(library, "use_gpu_aware_mpi").value = 0


def _look_for_platforms() -> None:
    """Raise an OSError where there is no OpenCL: ViennaCL would not come back from that."""
    count = ctypes.c_uint(0)
    status = ctypes.CDLL("libOpenCL.so.1").clGetPlatformIDs(0, None, ctypes.byref(count))
    if status != 0 or count.value == 0:
        raise OSError("OpenCL has no platform")


def usable_devices() -> list[Device]:
    """The devices that this process can use, the best first."""
    return [device for device in DEVICES.values() if failure(device) is None]


def find_device(name: str, comm: MPI.Comm) -> Device | None:
    """The device of a name.

    Parameters
    ----------
    name : str
        One of ``DEVICES``, ``"cpu"`` for the host, or ``"auto"`` for a device where there is one on
        each rank, or else the host.
    comm : mpi4py.MPI.Comm
        On which this is collective.

    Returns
    -------
    Device or None
        None for the host.

    Raises
    ------
    ValueError
        For an unknown name, and for a device that is not there; on all ranks, where it is on one.
    """
    instance("comm", comm, MPI.Comm, "a communicator of mpi4py's, such as mesh.comm")
    found = agree(comm, lambda: _find(name), "devices", "give one device's name on all ranks")
    if found == AUTO:
        everywhere = set.intersection(
            *map(set, comm.allgather([device.name for device in usable_devices()]))
        )
        return next((device for device in DEVICES.values() if device.name in everywhere), None)
    return DEVICES.get(found)


def _find(name: str) -> str:
    if isinstance(name, str) and name in (HOST, AUTO):
        return name
    if not isinstance(name, str) or name not in DEVICES:
        raise ValueError(
            f"device must be one of {AUTO}, {HOST}, {', '.join(DEVICES)}, found {shown(name)}"
        )
    why = failure(DEVICES[name])
    if why is not None:
        raise ValueError(f"device {name!r} is not there: {why}")
    return name


def transfers() -> tuple[float, ...]:
    """What PETSc has copied in this process so far, to devices and to the host, with the bytes.

    PETSc counts, whether it logs or not, whatever the reason; ``-log_view`` shows by event what
    this gives the sums of.
    """
    return tuple(counter.value for counter in _counters())


@cache
def _counters() -> list[ctypes.c_double]:
    # petsc4py has no names for them; petsclog.h has.
    library = ctypes.CDLL(PETSc.__file__)
    return [
        ctypes.c_double.in_dll(library, f"petsc_{name}")
        for name in ("ctog_ct", "gtoc_ct", "ctog_sz", "gtoc_sz")
    ]
