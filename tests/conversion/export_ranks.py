"""Programs of children: ranks that save a sharded state, and an export whose memory is looked at."""

from __future__ import annotations

import json
import resource
from typing import Any

import torch

import ckpt


def whole() -> torch.Tensor:
    return torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)


def save(rank: int, world: int, directory: str) -> None:
    import torch.distributed as td
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    td.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, Any] = {
        "model": {
            "rows": distribute_tensor(whole(), mesh, [Shard(0)]),
            "columns": distribute_tensor(whole(), mesh, [Shard(1)]),
        },
        "epochs": [1, {"lr": 0.5}],
    }
    dcp.save(state, checkpoint_id=f"{directory}/torch")
    with ckpt.Checkpointer(f"{directory}/ours", options=ckpt.Options(arena_bytes="8MiB")) as checkpointer:
        checkpointer.save(3, {"seed": rank}, sharded=state, replicated={"note": "same"}).result()
    td.destroy_process_group()


def export(words: list[str]) -> None:
    """Says by how much the memory of this process has grown at most, KiB."""
    from ckpt.cli.main import main

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(words)
    print(json.dumps({"code": code, "grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}))
