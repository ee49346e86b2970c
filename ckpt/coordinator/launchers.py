"""What launchers say of a process in its environment: its rank, and its place on its node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    # Not SLURM_NTASKS: sbatch sets that for its script too, of which there is one process. Only srun sets the other.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
# Of torchrun, Open MPI, MPICH, Slurm, in this order where several speak: torchrun's processes inherit what Slurm says of it.
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_NODE = ("GROUP_RANK", "SLURM_NODEID")


def world_of(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and world size."""
    names = names_of(environment)
    return None if names is None else (int(environment[names[0]]), int(environment[names[1]]))


def names_of(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The variables by which a launcher says them."""
    for rank, size in VARIABLES:
        if environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
            return rank, size
    return None


def local_ranks(environment: Mapping[str, str]) -> int | None:
    """Processes of this job on this node; None if that is not known."""
    found = [number for number in _numbers(environment, _LOCAL_RANKS) if number > 0]
    return found[0] if found else None


def local_rank(environment: Mapping[str, str]) -> int | None:
    """The number of this process among those of its node; None if that is not known."""
    return next(iter(_numbers(environment, _LOCAL_RANK)), None)


def node_number(environment: Mapping[str, str]) -> int | None:
    """Of this node in the job; None if that is not known."""
    return next(iter(_numbers(environment, _NODE)), None)


def _numbers(environment: Mapping[str, str], names: Iterable[str]) -> list[int]:
    texts = [environment.get(name, "") for name in names]
    return [int(text) for text in texts if text.isdigit()]
