"""One of two ranks whose tensors say which parts of others they are; they are saved by ckpt.integrations.dcp."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.checkpoint as stock
from dist.sharded_saves import begin
from support import DEADLINE_S, options

from ckpt.integrations import dcp

WHOLE = torch.arange(24.0).reshape(8, 3)


def parts_of(rank: int, full: bool) -> Any:
    """Two rows of the upper half and two of the lower one, with a row between them that belongs to nobody."""
    tensor: Any = torch.full((5, 3), -1.0)
    tensor.global_shape, tensor.global_offsets = (8, 3), ((2 * rank, 0), (2 * rank + 4, 0))
    tensor.local_offsets, tensor.local_sizes = ((0, 0), (3, 0)), ((2, 3), (2, 3))
    if full:
        tensor[0:2], tensor[3:5] = WHOLE[2 * rank : 2 * rank + 2], WHOLE[2 * rank + 4 : 2 * rank + 6]
    return tensor


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    begin(request)
    rank, where = request["rank"], f"{request['directory']}/id"
    dcp.configure(options())
    state = {"w": parts_of(rank, full=True), "n": 1}
    if request["call"] == "save":
        dcp.save(state, checkpoint_id=where)
    else:
        response = dcp.async_save(state, checkpoint_id=where, process_group=td.new_group(backend="gloo"))
        state["w"].fill_(7)  # copied: no optimizer owns it
        response.upload_completion.result(DEADLINE_S)
    td.barrier()
    found = {"w": parts_of(rank, full=False), "n": 0}
    dcp.load(found, checkpoint_id=where)
    whole = {"w": torch.zeros(8, 3)}
    stock.load(whole, checkpoint_id=where)
    loaded = torch.equal(found["w"], parts_of(rank, full=True)) and found["n"] == 1
    os.write(1, f"{json.dumps({'loaded': loaded, 'whole': whole['w'].tolist()})}\n".encode())
    os._exit(0)
