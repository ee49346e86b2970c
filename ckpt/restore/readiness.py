"""Whether all ranks can begin to read a file together."""

from __future__ import annotations

from ckpt.errors import CheckpointError, PeerError
from ckpt.restore.process_group import TEXT, RankGroup


class StartVote:
    """Whether all ranks can begin to read a file together, which they have to say before they do."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def cast(self, obstacle: object) -> CheckpointError | None:
        """A collective.

        Args:
            obstacle: why this rank cannot; None: it can.

        Returns:
            Why there is no going on if that lies with another rank.

        Raises:
            PeerError: the collective failed.
            CheckpointError: the process group is another than the ranks that restore.
        """
        group = RankGroup()
        stray: CheckpointError | None = None
        if (group.rank, group.size) != (self._rank, self._world_size):
            stray = CheckpointError(
                f"rank {self._rank} of {self._world_size} is rank {group.rank} of {group.size} in torch.distributed: ranks can "
                "read together only if the two agree; set Options.replicated_readers='each'"
            )
        if stray is not None and group.size != self._world_size:
            raise stray  # as on all ranks
        obstacle = stray or obstacle
        answers = group.gather({"obstacle": None if obstacle is None else str(obstacle)[:TEXT]})
        if stray is not None:
            raise stray
        found = [(rank, said["obstacle"]) for rank, said in enumerate(answers) if said["obstacle"] is not None]
        if not found or obstacle is not None:
            return None
        rank, text = found[0]
        return PeerError(f"rank {rank} cannot load what all ranks read together: {text}", [rank for rank, _ in found])
