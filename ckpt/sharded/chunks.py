"""Which part of a sharded tensor this rank holds: boxes of the whole tensor, from shape, placements and mesh alone.

A tensor that is sharded in strides, as tensor parallelism below FSDP does it, is one box on each rank where both go over the
same dimension. Else what a rank holds may be several boxes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

Run = tuple[int, int]  # the first index in the whole tensor, and how many follow each other


class Box(NamedTuple):
    """
    Attributes:
        offsets, sizes: in the whole tensor.
        begin: where it begins in the local tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: tuple[int, ...]


class LocalPart(NamedTuple):
    """
    Attributes:
        shape: of the local tensor.
        boxes: at least one, which may be empty.
        replicated: the dimensions of the mesh over which it is not sharded.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    replicated: tuple[int, ...]


def kind_of(placement: Any) -> Any:
    """What two placements have in common that mean the same."""
    return type(placement), getattr(placement, "dim", None), getattr(placement, "split_factor", None)


def local_part(
    shape: Sequence[int], placements: Sequence[Any], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> LocalPart:
    """
    Args:
        coordinate: of this rank in the mesh.

    Raises:
        ValueError: it has a placement that says nothing of where its values belong.
    """
    runs: list[list[Run]] = [[(0, size)] for size in shape]
    replicated = []
    for mesh_dim, placement in enumerate(placements):
        dim = getattr(placement, "dim", None)
        if placement.is_replicate():
            replicated.append(mesh_dim)
        elif placement.is_partial() or not isinstance(dim, int):
            raise ValueError(
                f"it has the placement {placement}: its values are not there until the ranks have reduced them. Redistribute "
                "it, to Replicate() or Shard(), before it is saved"
            )
        else:
            many, mine = mesh_shape[mesh_dim], coordinate[mesh_dim]
            split = getattr(placement, "split_factor", None)
            runs[dim] = _piece(runs[dim], many, mine) if split is None else _strided_piece(runs[dim], int(split), many, mine)
    local = tuple(sum(length for _, length in each) for each in runs)
    if 0 in local:
        # Where torch.distributed.checkpoint says that a part lies which is not there: at the end.
        offsets = tuple(size if length == 0 else each[0][0] for size, length, each in zip(shape, local, runs, strict=True))
        return LocalPart(local, (Box(offsets, local, (0,) * len(local)),), tuple(replicated))
    return LocalPart(local, tuple(_boxes(runs)), tuple(replicated))


def _boxes(runs: list[list[Run]]) -> list[Box]:
    placed = []
    for of_dim in runs:
        ends = itertools.accumulate(length for _, length in of_dim)
        placed.append([(first, length, end - length) for (first, length), end in zip(of_dim, ends, strict=True)])
    found = []
    for box in itertools.product(*placed):
        offsets, sizes, begin = zip(*box, strict=True) if box else ((), (), ())
        found.append(Box(tuple(offsets), tuple(sizes), tuple(begin)))
    return found


def _piece(runs: list[Run], many: int, mine: int) -> list[Run]:
    """As torch.chunk() cuts: pieces of the same size, of which the last may be short, or missing."""
    length = sum(length for _, length in runs)
    each = -(-length // many)
    return _cut(runs, min(each * mine, length), min(each * (mine + 1), length))


def _strided_piece(runs: list[Run], split: int, many: int, mine: int) -> list[Run]:
    """A piece of each of `split` pieces."""
    return _join(run for number in range(split) for run in _piece(_piece(runs, split, number), many, mine))


def _cut(runs: list[Run], begin: int, end: int) -> list[Run]:
    found, at = [], 0
    for first, length in runs:
        low, high = max(begin, at), min(end, at + length)
        if low < high:
            found.append((first + low - at, high - low))
        at += length
    return found


def _join(runs: Any) -> list[Run]:
    joined: list[Run] = []
    for first, length in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((first, length))
    return joined
