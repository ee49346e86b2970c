"""One rank of a job that saves sharded states: by the library, and by torch for comparison."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from dist import sharded_states
from support import DEADLINE_S, options

import ckpt
from ckpt import _native


def begin(request: dict[str, Any]) -> None:
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(request["rank"]), str(request["world"])
    td.init_process_group("gloo", init_method=f"file://{request['meeting']}", rank=request["rank"], world_size=request["world"])


def say(**words: Any) -> None:
    os.write(1, f"{json.dumps(words)}\n".encode())


def save_cases(request: dict[str, Any]) -> None:
    """Each case: what it is in full, what torch makes of it, and what we do, with steps behind save()."""
    begin(request)
    for name, (make, worlds) in sharded_states.CASES.items():
        if request["world"] in worlds:
            _save_case(Path(request["directory"]) / f"{name}-{request['world']}", name, make(request["world"]))
    td.barrier()
    os._exit(0)


def _save_case(directory: Path, name: str, case: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    whole = getattr(case, "whole", None)
    expected = sharded_states.in_full(case.state()) if whole is None else whole
    if whole is None:
        dcp.save(case.state(), checkpoint_id=str(directory / "stock"))
    if td.get_rank() == 0:
        torch.save(expected, directory / "expected.pt")
    compat = None if td.get_world_size() == 2 else "2.14"
    with ckpt.Checkpointer(directory / "ours", options=options(metadata_compat=compat), coordinator="torch") as checkpointer:
        _native.set_fault(call="pwritev", path_part="distcp", delay_s=0.02)
        pending = checkpointer.save(1, sharded=case.state())
        ckpt.fence()
        case.step()
        pending.result(DEADLINE_S)
        _native.clear_faults()
        stats = pending.stats
    if whole is None:
        after = sharded_states.tensors_of(sharded_states.in_full(case.state()))
        pairs = zip(sharded_states.tensors_of(expected), after, strict=True)
        assert any(not torch.equal(before, now) for before, now in pairs if before.is_floating_point() and before.itemsize > 1)
    say(case=name, total=stats.bytes_total, in_save=stats.bytes_copied_in_save, zero_copy=stats.bytes_from_tensors,
        at_fence=stats.bytes_copied_at_fence)  # fmt: skip


def load_cases(request: dict[str, Any]) -> None:
    """What other ranks have saved, into models of this number of ranks that know nothing of it."""
    begin(request)
    for folder in sorted(folder for root in request["directories"] for folder in Path(root).iterdir()):
        name = folder.name.rpartition("-")[0]
        make, worlds = sharded_states.CASES.get(name, (None, ()))
        if make is not None and (request["world"] in worlds or (request["world"] == 3 and name in ("fsdp", "placements"))):
            _load_case(folder, make(request["world"]))
    td.barrier()
    os._exit(0)


def _load_case(folder: Path, case: Any) -> None:
    case.step()  # to other values
    state = case.state()
    whole = torch.load(folder / "expected.pt", weights_only=False)
    assert sharded_states.difference(whole, sharded_states.whole_of(case, state)) != ""
    with ckpt.Checkpointer(folder / "ours", options=options(), coordinator="torch") as checkpointer:
        found = checkpointer.restore(sharded_into=state)
    assert found is not None and found.step == 1 and found.sharded is state
    say(case=folder.name, error=sharded_states.difference(whole, sharded_states.whole_of(case, state)))


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    globals()[request["work"]](request)
    os._exit(0)
