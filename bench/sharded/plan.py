"""What a job of ranks is told to measure."""

from __future__ import annotations

import dataclasses

SAVES, LOADS, PLANNING = "saves", "loads", "planning"


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    Attributes:
        part: SAVES, LOADS or PLANNING.
        directory: where files are written.
        results: where rank 0 leaves what was measured, as JSON.
        rounds: samples of each side.
        rest_s: rest before each sample, seconds.
        tensors, nbytes: of the state, all ranks together.
        compute_s: of what stands for forward and backward; None: longer than a flush of each side, and at least
            `least_compute_s`.
        rivals: parts of the names of those to measure beside ours; empty: all.
        write: whether LOADS begins with writing what is loaded.
        simulated_ranks: of PLANNING.
    """

    part: str
    directory: str
    results: str
    rounds: int
    rest_s: float
    tensors: int
    nbytes: int = 0
    compute_s: float | None = None
    least_compute_s: float = 0.5
    rivals: tuple[str, ...] = ()
    write: bool = False
    simulated_ranks: int = 0
