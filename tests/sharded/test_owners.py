"""Who writes what several ranks hold: each rank finds it out alone, and together they write each part once."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.plan.save_plan import SavePlan
from ckpt.sharded.contents import decode, digest, encode
from ckpt.sharded.entries import EntryFinder
from ckpt.sharded.meshes import Group, MeshPlace
from ckpt.sharded.owners import find_owned
from ckpt.sharded.planning import ShardedPlanner


class Job:
    """All ranks of a job, one after the other, in this process."""

    def __init__(self, world: int) -> None:
        self.world = world

    def __enter__(self) -> Job:
        return self

    def become(self, rank: int) -> None:
        if td.is_initialized():
            td.destroy_process_group()
        td.init_process_group("fake", rank=rank, world_size=self.world, store=FakeStore())

    def __exit__(self, *_: Any) -> None:
        if td.is_initialized():
            td.destroy_process_group()


def test_each_item_has_one_owner_and_all_write_about_as_much() -> None:
    chance = random.Random(2)
    groups = [[0, 1, 2, 3, 4, 5], [0, 2, 4], [1, 3, 5], [0], [3]]
    items = [(chance.choice(groups), chance.randrange(1, 1000)) for _ in range(500)]
    loads, owners = Counter[tuple[int, int]](), Counter[int]()
    for rank in range(6):
        mine = [number for number, (ranks, _) in enumerate(items) if rank in ranks]
        given = [(Group(bytes(items[n][0]), len(items[n][0]), items[n][0].index(rank)), items[n][1]) for n in mine]
        for place in find_owned(given):
            owners[mine[place]] += 1
            loads[groups.index(items[mine[place]][0]), rank] += items[mine[place]][1]
    assert set(owners.values()) == {1} and len(owners) == len(items)
    for number, ranks in enumerate(groups):
        of_group = [loads[number, rank] for rank in ranks]
        assert max(of_group) - min(of_group) < 1000, "they differ by less than one item"


@pytest.mark.parametrize("part", [None, "a", "b", ("a", "b")], ids=str)
def test_groups_are_the_ranks_that_hold_the_same(part: Any) -> None:
    """On a mesh, and on a part of it, of which each rank sees another one."""
    held: dict[tuple[int, ...], set[int]] = {}
    groups: dict[int, dict[tuple[int, ...], Group]] = {}
    ways = [(), (0,), (1,), (0, 1)]
    with Job(8) as job:
        for rank in range(8):
            job.become(rank)
            root = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
            mesh = root if part is None else root[part]
            place = MeshPlace(mesh, rank, 8)
            groups[rank] = {way: place.group(way) for way in ways if all(dim < mesh.ndim for dim in way)}
            for way in groups[rank]:
                # What a tensor is that is sharded over the other dimensions: told by the coordinates there.
                name = (*way, -1, *(c for dim, c in enumerate(place.coordinate) if dim not in way))
                held.setdefault(name, set()).add(rank)
    for rank, found in groups.items():
        for way, group in found.items():
            (same,) = [ranks for name, ranks in held.items() if rank in ranks and name[: len(way) + 1] == (*way, -1)]
            assert group.size == len(same) and sorted(same)[group.place] == rank
            assert all(groups[other][way].key == group.key for other in same)


def made(mesh: Any, tensors: int) -> dict[str, Any]:
    shards = mesh.shape[1]
    return {
        f"layers.{number}": DTensor.from_local(
            torch.empty(4, 2), mesh, [Replicate(), Shard(0)], run_check=False, shape=(4 * shards, 2), stride=(2, 1)
        )
        for number in range(tensors)
    }


def plan(planner: ShardedPlanner, state: dict[str, Any]) -> SavePlan:
    return planner.plan(state, lambda _: False, 1 << 16, False)


def test_planning_on_one_of_very_many_ranks() -> None:
    """Nothing grows with the number of ranks but what is found out of a mesh, once."""
    took = {}
    with Job(16_384) as job:
        job.become(5_000)
        mesh = init_device_mesh("cpu", (1024, 16), mesh_dim_names=("replicate", "shard"))
        state = made(mesh, 1000) | {"step": 1, "ones": torch.ones(3)}
        planner = ShardedPlanner(EntryFinder(5_000, 16_384), 5_000, 16_384)
        first = plan(planner, state)
        begin = time.perf_counter()
        second = plan(planner, state)
        took["again"] = time.perf_counter() - begin
    assert [item.key for item in first.contents.items] == [item.key for item in second.contents.items]
    assert len(first.contents.items) <= 2, "each of the 1024 replicas of a part writes about one tensor"
    print(f"planned again in {took['again'] * 1000:.1f} ms")


def test_all_ranks_together_write_each_part_once() -> None:
    written: Counter[tuple[int, Any]] = Counter()
    with Job(6) as job:
        for rank in range(6):
            job.become(rank)
            mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("replicate", "shard"))
            state = made(mesh, 20) | {"step": 1, "plain": torch.ones(30)}
            found = plan(ShardedPlanner(EntryFinder(rank, 6), rank, 6), state).contents
            assert (found.description is None) == (rank != 0)
            written.update((item.key, item.box and item.box.offsets) for item in found.items)
    assert set(written.values()) == {1} and len(written) == 20 * 2 + 2


def test_a_layout_survives_its_message() -> None:
    with Job(1) as job:
        job.become(0)
        state = {"a": torch.zeros(3, 4), "b": torch.zeros(()), "c": "text"}
        items = plan(ShardedPlanner(EntryFinder(0, 1), 0, 1), state).contents.items
    text = encode(items, [(10, 20), (30, 40), (50, 1 << 40)])
    found = decode(text)
    assert [(item.key, item.offsets, item.sizes, item.at, item.length) for item in found] == [
        (0, (0, 0), (3, 4), 10, 20),
        (1, (), (), 30, 40),
        (2, None, (), 50, 1 << 40),
    ]
    assert digest(text) != digest(encode(items, [(10, 20), (30, 40), (50, 1)])) and len(digest(text)) == 32
    with pytest.raises(ValueError, match="layout"):
        decode("0" * 25)
