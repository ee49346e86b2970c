"""One of several ranks that train on while a save is on its way: a forward moves statistics, and a step all that it writes.

It says which keys a process with torch alone would find changed in what was saved.
"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as stock
from dist import sharded_states
from dist.sharded_saves import begin
from support import DEADLINE_S, options
from torch.distributed.checkpoint import staging
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

import ckpt
from ckpt import _native
from ckpt.integrations import dcp


def save(way: str, state: Any, directory: Path, gone_on: threading.Event) -> tuple[Path, Future[Any] | ckpt.PendingSave]:
    """Where it is going to be, and what has the outcome.

    Args:
        gone_on: training has, by a forward and a step.
    """
    if way == "checkpointer":
        made = ckpt.Checkpointer(directory, options=options(metadata_compat="2.14"), coordinator="torch")
        return directory / "step-000000000001", made.save(1, sharded=state)
    if way == "dcp":
        dcp.configure(options(metadata_compat="2.14"))
        return directory / "id", dcp.async_save(state, checkpoint_id=str(directory / "id")).upload_completion
    stage = staging.DefaultStager._stage

    def late(self: Any, *arguments: Any, **more: Any) -> Any:
        assert gone_on.wait(DEADLINE_S)
        return stage(self, *arguments, **more)

    staging.DefaultStager._stage = late  # type: ignore[method-assign]
    in_background = staging.DefaultStager(staging.StagingOptions(False, False, True, False))
    found: Any = stock.async_save(state, checkpoint_id=str(directory / "id"), async_stager=in_background)
    return directory / "id", found.upload_completion


def changed(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    pairs = ((key, sharded_states.difference(value, found[key])) for key, value in expected.items())
    return sorted(key for key, difference in pairs if difference or not same_values(expected[key], found[key]))


def same_values(expected: Any, found: Any) -> bool:
    return not isinstance(expected, torch.Tensor) or torch.equal(expected, found)


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    begin(request)
    gone_on = threading.Event()
    case = sharded_states.fsdp(request["world"])
    expected = sharded_states.in_full(case.state())
    _native.set_fault(call="pwritev", path_part="distcp", delay_s=0.05)
    where, pending = save(request["way"], case.state(), Path(request["directory"]), gone_on)
    with torch.no_grad():
        case.model(torch.randn(16, 64))
    case.step()
    gone_on.set()
    pending.result(DEADLINE_S)
    _native.clear_faults()
    case.step()
    now = sharded_states.in_full(case.state())
    state = case.state()
    stock.load(state, checkpoint_id=str(where))
    before, after = (flatten_state_dict(each)[0] for each in (expected, sharded_states.in_full(state)))
    said = {"changed": changed(before, after), "trained": changed(before, flatten_state_dict(now)[0])}
    os.write(1, f"{json.dumps(said)}\n".encode())
    os._exit(0)
