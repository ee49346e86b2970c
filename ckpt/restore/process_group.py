"""A process group of torch.distributed, for reading a file together: small messages among all, and large broadcasts.

These are collectives, so they belong to the thread that trains: see shared_read.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ckpt.errors import CheckpointError, PeerError
from ckpt.loading.host_memory import bytes_of
from ckpt.loading.unpickle import first_line

_MESSAGE_BYTES = 8192  # of one rank; as much is sent whatever the message is, so that one collective does
TEXT = 600  # characters of an error that the others are told


class RankGroup:
    """
    Args:
        group: of torch.distributed; default: its default group.
        device: where the tensors of all collectives are to lie; default: the host if the group's backend can send from
            there, else the current CUDA device.

    Attributes:
        rank, size: of this process in the group, and of the group.
        staged: whether bytes have to be copied to `device` to be sent, and from there.

    Raises:
        CheckpointError: torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise CheckpointError(
                "torch.distributed is not initialised, and ranks that read a file together send each other its parts through "
                "it: call torch.distributed.init_process_group() first, or let every rank read for itself"
            )
        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise CheckpointError("this process is not in the group of ranks that are to read a file together")
        self.staged = device is not None or not _sends_from_host(group)
        self.device = device or torch.device("cuda", torch.cuda.current_device()) if self.staged else torch.device("cpu")

    def gather(self, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each rank says, in their order, to all of them. A collective.

        Args:
            said: at most some KiB of JSON.

        Raises:
            PeerError: the collective failed.
        """
        text = json.dumps(said).encode()
        assert len(text) <= _MESSAGE_BYTES
        if self.size == 1:
            return [json.loads(text)]
        with self.explained():
            own = torch.frombuffer(bytearray(text.ljust(_MESSAGE_BYTES)), dtype=torch.uint8).to(self.device)
            every = [torch.empty_like(own) for _ in range(self.size)]
            self._dist.all_gather(every, own, group=self._group)
            answers = [dict(json.loads(bytes_of(message.cpu().untyped_storage()))) for message in every]
            if any(answer.keys().isdisjoint(said) for answer in answers):
                raise ValueError("another rank is at another point of its restore")
            return answers

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        """From the rank `root` of the group; returns what has a wait(). A collective."""
        source = root if self._group is None else self._dist.get_global_rank(self._group, root)
        return self._dist.broadcast(tensor, src=source, group=self._group, async_op=True)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Around collectives.

        Raises:
            PeerError: one of them failed; which rank is to blame is not known.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:  # the latter: an answer to another collective than was asked
            raise PeerError(
                f"ranks that read a file together have lost each other: rank {self.rank} of {self.size}: {first_line(error)}. "
                "A rank has died or hangs, or makes another collective call than the others: look for its own error, and "
                "start the job again; if ranks are only slow, give init_process_group() a longer timeout"
            ) from error


def _sends_from_host(group: Any) -> bool:
    from torch.distributed.distributed_c10d import get_backend_config

    return "cpu:" in get_backend_config(group)  # as in "cpu:gloo,cuda:nccl"
