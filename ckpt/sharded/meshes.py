"""Where a device mesh lies among the ranks of the job, and which ranks hold the same part of a tensor on it.

Nothing is asked of other ranks. A mesh may be a part of another one, its root, as `mesh["tp"]` is: then each rank has a mesh
of its own ranks, and its siblings, which lie in the other places of the root, hold replicas of its tensors.
"""

from __future__ import annotations

import array
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ckpt import torch_private


class Group(NamedTuple):
    """Ranks that hold the same bytes.

    Attributes:
        key: names them.
        size: how many they are.
        place: this rank's among them, by its number.
    """

    key: bytes
    size: int
    place: int


def everywhere(rank: int, world_size: int) -> Group:
    """Of all ranks."""
    return Group(array.array("q", range(world_size)).tobytes(), world_size, rank)


class MeshPlace:
    """
    Args:
        rank, world_size: of this process in the job.

    Attributes:
        coordinate: of this rank in the mesh.
        shape: of the mesh.
        description: is the same on all ranks, unless they have put the mesh elsewhere.

    Raises:
        ValueError: it is no mesh of this job's ranks; says why.
    """

    def __init__(self, mesh: Any, rank: int, world_size: int) -> None:
        root = torch_private.root_mesh(mesh).mesh.to(torch.int64)
        own = mesh.mesh.to(torch.int64)
        _check_ranks(mesh, root, rank, world_size)
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"this rank, {rank}, does not belong to the {mesh}: sharded tensors must have a part on all ranks")
        self.coordinate = tuple(map(int, coordinate))
        self.shape = tuple(own.shape)
        self._rank = rank
        self._root_ranks = root.flatten()
        self._groups: dict[tuple[int, ...], Group] = {}

        place_of = torch.empty(world_size, dtype=torch.int64, device="cpu")  # in the root, by the rank
        place_of[self._root_ranks] = torch.arange(world_size, device="cpu")
        # Places in the root, as a sum of two: of that which tells the ranks of the mesh apart, and of what they have in common.
        coordinates = (
            torch.stack(torch.unravel_index(place_of[own.flatten()], root.shape)) if root.dim() else own.new_zeros(1, 1)
        )
        varies = (coordinates != coordinates[:, :1]).any(1)
        strides = torch.tensor(_strides(root.shape), dtype=torch.int64, device="cpu")
        self._inside = (coordinates * (strides * varies)[:, None]).sum(0).reshape(own.shape)
        self._beside = _all_places([n for n, inside in zip(root.shape, varies.tolist(), strict=True) if not inside],
                                   strides[~varies].tolist())  # fmt: skip
        if own.numel() * self._beside.numel() != world_size:
            raise ValueError(
                f"the {mesh} is no regular part of its root mesh {tuple(root.shape)}: who else holds its tensors is unknown"
            )
        self.description = f"{self.shape} of {tuple(root.shape)} {_crc32(self._root_ranks):08x}-{_crc32(self._inside):08x}"

    def group(self, replicated: Sequence[int]) -> Group:
        """Of the ranks that hold what this one holds of a tensor.

        Args:
            replicated: the dimensions of the mesh over which it is not sharded.
        """
        key = tuple(replicated)
        found = self._groups.get(key)
        if found is None:
            where = tuple(slice(None) if dim in key else place for dim, place in enumerate(self.coordinate))
            inside = self._inside[where].reshape(-1)
            members = self._root_ranks[(inside[:, None] + self._beside[None, :]).flatten()].sort().values
            place = int(torch.searchsorted(members, self._rank))
            found = self._groups[key] = Group(_packed(members), members.numel(), place)
        return found


def _check_ranks(mesh: Any, root: torch.Tensor, rank: int, world_size: int) -> None:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"the process group of the {mesh} is gone: torch.distributed is not initialised")
    if dist.get_rank() != rank or dist.get_world_size() != world_size:
        raise ValueError(
            f"this is rank {dist.get_rank()} of {dist.get_world_size()} for torch.distributed, and for its device meshes, but "
            f"rank {rank} of {world_size} for the Checkpointer: both must be the same (see coordinator=)"
        )
    ranks = root.flatten()
    if ranks.numel() != world_size or not torch.equal(ranks.sort().values, torch.arange(world_size, device="cpu")):
        raise ValueError(
            f"the {mesh} has {ranks.numel()} ranks, which are not those of the Checkpointer, 0 to {world_size - 1}: sharded "
            "tensors must lie on a mesh of all ranks, or on a part of one"
        )


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * shape[dim]
    return strides


def _all_places(shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(shape, strides, strict=True):
        places = (places[:, None] + torch.arange(size, device="cpu")[None, :] * stride).flatten()
    return places


def _packed(numbers: torch.Tensor) -> bytes:
    return array.array("q", numbers.flatten().tolist()).tobytes()


def _crc32(numbers: torch.Tensor) -> int:
    return zlib.crc32(_packed(numbers))
