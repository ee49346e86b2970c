"""What one of very many ranks does and says to plan a save. The others are not there: no rank asks another one.

The process group is torch's fake one, which only knows how many ranks there are, and which of them this process is.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckpt
from bench.measure.sampling import clock
from bench.sharded.plan import Plan
from ckpt.commit.layout_exchange import LayoutExchange
from ckpt.plan.save_plan import SavePlan
from ckpt.sharded.contents import encode
from ckpt.sharded.entries import EntryFinder
from ckpt.sharded.metadata import MetadataWriter
from ckpt.sharded.planning import ShardedPlanner

LOCAL = (4, 2)
SHARDS = 16  # of which each has replicas, in the second case


def measure_planning(plan: Plan) -> dict[str, Any]:
    ranks = max(2 * SHARDS, plan.simulated_ranks // SHARDS * SHARDS)
    meshes = {"all shards": (1, ranks), f"{SHARDS} shards, replicated": (ranks // SHARDS, SHARDS)}
    rows = {
        f"{name}, rank {rank}": measure_one(plan, ranks, mesh, rank)
        for name, mesh in meshes.items()
        for rank in (0, ranks // 3)
    }
    return {"samples": rows, "ranks": ranks, "tensors": plan.tensors}


def measure_one(plan: Plan, ranks: int, mesh_shape: tuple[int, int], rank: int) -> list[dict[str, Any]]:
    """The first row is the first save's, when meshes and parts are not known yet."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        state = make_state(mesh_shape, plan.tensors)
        planner = ShardedPlanner(EntryFinder(rank, ranks), rank, ranks)
        exchange = LayoutExchange(MetadataWriter())
        return [once(planner, exchange, state) for _ in range(1 + plan.rounds)]
    finally:
        dist.destroy_process_group()


def make_state(mesh_shape: tuple[int, int], tensors: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    whole = {"shape": torch.Size((LOCAL[0] * mesh_shape[1], LOCAL[1])), "stride": (LOCAL[1], 1), "run_check": False}
    named = {
        f"layers.{number}.weight": DTensor.from_local(torch.empty(LOCAL), mesh, [Replicate(), Shard(0)], **whole)
        for number in range(tensors)
    }
    return {"model": named, "step": 1}


def once(planner: ShardedPlanner, exchange: LayoutExchange, state: dict[str, Any]) -> dict[str, Any]:
    started = clock()
    with as_in_a_save():
        made = planner.plan(state, lambda _: False, ckpt.Options().eager_bytes, False)
    planned = clock()
    word = exchange.say(encode(made.contents.items, places_of(made)))
    exchange.note_published()
    said = json.dumps(dataclasses.asdict(word)).encode()
    told = clock()
    values = {"plan_s": planned - started, "layout_bytes": float(len(said)), "layout_s": told - planned}
    return {"started_s": started, "values": values | {"items": float(len(made.contents.items))}}


def places_of(made: SavePlan) -> Sequence[tuple[int, int]]:
    """Where the archives might lie in a file: they stay there from save to save."""
    return [(number * 4096, 1024) for number in range(len(made.contents.items))]


@contextmanager
def as_in_a_save() -> Iterator[None]:
    """A save plans with the cyclic collector off."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
