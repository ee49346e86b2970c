"""How the ranks of a job agree: one primitive, four ways to carry it.

"local"   a job of one process
"torch"   the key-value store of torch.distributed
"mpi"     mpi4py
"file"    a directory that all ranks share
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from ckpt.coordinator.base import Coordinator
from ckpt.coordinator.launchers import world_of
from ckpt.coordinator.local import LocalCoordinator
from ckpt.coordinator.mpi import MPICoordinator
from ckpt.coordinator.shared_directory import FileCoordinator
from ckpt.coordinator.torch_store import StoreCoordinator, has_store
from ckpt.errors import CheckpointError

__all__ = ["Coordinator", "make_coordinator"]

NAMES = ("local", "torch", "mpi", "file")


def make_coordinator(which: str | Coordinator = "auto", *, directory: Path | None = None) -> Coordinator:
    """The coordinator of this job. All ranks must call it: they wait for each other, for up to 300 seconds.

    Args:
        which: "local", "torch", "mpi" or "file"; or "auto": "torch" if torch.distributed is initialised; else "mpi" if mpi4py
            runs with more than one rank, or mpirun has started more than one and mpi4py is installed; else "file" if the
            environment says that there are more ranks than one (RANK and WORLD_SIZE, or those of a step of Slurm, which srun
            starts, Open MPI, PMI); else "local". A coordinator is returned as it is.
        directory: where "file" keeps its messages; shared by all ranks. None: there is no such place.

    Raises:
        ValueError: there is no coordinator of that name.
        CheckpointError: it cannot work here; the message says why and what to do.
        PeerError: not all ranks came.
    """
    if isinstance(which, Coordinator):
        return which
    name = _best() if which == "auto" else which
    if name == "local":
        return LocalCoordinator()
    if name == "torch":
        return StoreCoordinator()
    if name == "mpi":
        return MPICoordinator()
    if name == "file":
        if directory is None:
            raise CheckpointError(
                "the coordinator 'file' has no directory here: initialise torch.distributed, or choose 'mpi' or 'local'"
            )
        return FileCoordinator(Path(directory))
    names = ", ".join(repr(known) for known in ("auto", *NAMES))
    raise ValueError(f"there is no coordinator {which!r}: choose one of {names}")


def _best() -> str:
    """The name of the coordinator that suits this process."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized() and has_store():
        return "torch"
    if _mpi_size() > 1:
        return "mpi"
    world = world_of(os.environ)
    return "file" if world is not None and world[1] > 1 else "local"


def _mpi_size() -> int:
    """Ranks of MPI as far as that can be known without initialising it; 1 if there is none, or no mpi4py."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        return int(mpi.COMM_WORLD.Get_size())
    sizes = [os.environ.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    size = max((int(text) for text in sizes if text.isdigit()), default=1)
    return size if size > 1 and importlib.util.find_spec("mpi4py") is not None else 1
