"""Where the parts of a tensor lie: as torch itself says it, and so that together they are the tensor."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt.sharded.chunks import local_part

MESHES = [(1,), (2,), (3,), (4,), (7,), (2, 2), (2, 3), (3, 2), (4, 2), (2, 2, 2)]
SHAPES = [(), (0,), (1,), (5,), (16,), (6, 4), (5, 7), (3, 0), (1, 9), (8, 3, 5)]


def coordinates(mesh: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, mesh)))


def plain_placements(shape: tuple[int, ...], dims: int) -> list[tuple[Any, ...]]:
    return list(itertools.product([Replicate(), *(Shard(dim) for dim in range(len(shape)))], repeat=dims))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_they_lie_where_torch_says(mesh: tuple[int, ...]) -> None:
    seen = 0
    for shape in SHAPES:
        for placements in plain_placements(shape, len(mesh)):
            for coordinate in coordinates(mesh):
                part = local_part(shape, placements, mesh, coordinate)
                sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
                (box,) = part.boxes
                assert (part.shape, box.sizes, box.offsets) == (tuple(sizes), tuple(sizes), tuple(offsets))
                assert part.replicated == tuple(dim for dim, each in enumerate(placements) if each.is_replicate())
                seen += 1
    assert seen > 20


def rows_of(whole: torch.Tensor, placements: Any, mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> torch.Tensor:
    """What torch gives to a rank."""
    local = whole
    for placement, many, mine in zip(placements, mesh, coordinate, strict=True):
        if not placement.is_replicate():
            local = placement._split_tensor(local, many, with_padding=False, contiguous=True)[0][mine]
    return local


def test_strided_parts_are_what_torch_gives_to_a_rank() -> None:
    """In one box or several: each box of the whole is the same place of the local tensor; and each element is somebody's."""
    chance = random.Random(1)
    for _ in range(400):
        mesh = chance.choice([(2, 2), (2, 3), (3, 2), (4, 2), (2, 2, 2)])
        shape = tuple(chance.randrange(1, 20) for _ in range(chance.choice([1, 2, 3])))
        placements = []
        for _ in mesh:
            dim = chance.randrange(len(shape))
            placements.append(
                chance.choice([Shard(dim), Replicate(), _StridedShard(dim, split_factor=chance.choice([2, 3, 4]))])
            )
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        count = torch.zeros(shape, dtype=torch.int64)
        for coordinate in coordinates(mesh):
            local = rows_of(whole, placements, mesh, coordinate)
            part = local_part(shape, placements, mesh, coordinate)
            assert part.shape == tuple(local.shape)
            held = torch.zeros(part.shape, dtype=torch.int64)
            for box in part.boxes:
                inside = tuple(slice(begin, begin + size) for begin, size in zip(box.begin, box.sizes, strict=True))
                outside = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))
                if 0 not in box.sizes:
                    assert torch.equal(local[inside], whole[outside])
                    held[inside] += 1
                    count[outside] += 1
            assert bool((held == 1).all())
        copies = torch.Size(many for many, each in zip(mesh, placements, strict=True) if each.is_replicate()).numel()
        assert bool((count == copies).all())


def test_values_that_are_not_final_are_refused() -> None:
    with pytest.raises(ValueError, match="until the ranks have reduced them"):
        local_part((4,), (Partial(),), (2,), (0,))
