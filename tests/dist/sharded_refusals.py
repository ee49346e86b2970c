"""One of two ranks that give sharded= what cannot be saved so; prints what it is told, a line each: `name: type: text`."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as td
from dist import sharded_states
from support import DEADLINE_S, options
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import ckpt
from ckpt import _native


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def told(name: str, checkpointer: ckpt.Checkpointer, step: int, sharded: Any, after: Any = None) -> None:
    try:
        pending = checkpointer.save(step, sharded=sharded)
        if after is not None:
            after()
        pending.result(DEADLINE_S)
        say(f"{name}: accepted")
    except Exception as error:
        kinds = [kind.__name__ for kind in (TypeError, ValueError) if isinstance(error, kind)]
        say(f"{name}: {kinds[0] if kinds else type(error).__name__}: {error}")


def states(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    alone = DeviceMesh("cpu", [0])
    shard = DTensor.from_local(torch.zeros(4, 3), mesh, [Shard(0)])
    old = sharded_tensor.zeros(ChunkShardingSpec(0, ["rank:0/cpu", "rank:1/cpu"]), 4, 2)
    part = torch.zeros(2, 3)
    part.global_shape, part.global_offsets = (4, 3), ((2 * rank, 0),)  # type: ignore[attr-defined]
    part.local_offsets, part.local_sizes = ((0, 0),), ((2, 3),)  # type: ignore[attr-defined]
    short = DTensor.from_local(torch.zeros(4 + rank, 3), mesh, [Shard(0)], run_check=False, shape=(8, 3), stride=(3, 1))
    return {
        "partial": {"w": DTensor.from_local(torch.zeros(4), mesh, [Partial()])},
        "sharded-tensor": {"model": {"w": old}},
        "named-part": {"w": part},
        "other-mesh": {"w": DTensor.from_local(torch.zeros(4), alone, [Replicate()], run_check=False)},
        "same-key": {"a": {"b": 1}, "a.b": 2},
        "inside": {"pair": (shard, 1)},
        "meta": {"w": torch.zeros(3, device="meta")},
        "sparse": {"w": torch.eye(3).to_sparse()},
        "function": {"f": lambda: rank},
        "list": [shard],
        "short": {"w": short},
        "good": {"w": shard, "n": 1},
    }


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(request["rank"]), "2"
    td.init_process_group("gloo", init_method=f"file://{request['meeting']}", rank=request["rank"], world_size=2)
    with ckpt.Checkpointer(request["directory"], options=options(max_failed_saves=0), coordinator="torch") as checkpointer:
        for step, (name, state) in enumerate(states(request["rank"]).items()):
            told(name, checkpointer, step, state)
        trained = sharded_states.fsdp(2)
        _native.set_fault(call="pwritev", path_part="distcp", delay_s=0.5)
        told("unannounced", checkpointer, 100, trained.state(), lambda: trained.model.up.weight.to_local().data.add_(1))
        _native.clear_faults()
        checkpointer._unreported = checkpointer._last_failed = None
    with ckpt.Checkpointer(f"{request['directory']}-{request['rank']}", options=options(), coordinator="local") as checkpointer:
        mesh = init_device_mesh("cpu", (2,))
        told("other-ranks", checkpointer, 1, {"w": DTensor.from_local(torch.zeros(4), mesh, [Shard(0)])})
    td.destroy_process_group()
    with ckpt.Checkpointer(f"{request['directory']}-again-{request['rank']}", options=options(), coordinator="local") as alone:
        told("no-group", alone, 1, {"w": DTensor.from_local(torch.zeros(4), mesh, [Replicate()], run_check=False)})
    os._exit(0)
