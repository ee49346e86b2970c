"""One rank of a job that saves by ckpt.integrations.dcp, and by its parts, where others would call torch.distributed.checkpoint."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.checkpoint as stock
from dist import sharded_states
from dist.sharded_saves import begin
from support import DEADLINE_S, options, patience
from torch.distributed.checkpoint import staging
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType

from ckpt import _native
from ckpt.integrations import dcp


def say(**words: Any) -> None:
    os.write(1, f"{json.dumps(words)}\n".encode())


def slow_writes() -> None:
    _native.set_fault(call="pwritev", path_part="distcp", delay_s=0.02)


def save_cases(request: dict[str, Any]) -> None:
    """Each case, to an id that holds something else: what it is in full, what torch makes of it, and what we do."""
    begin(request)
    dcp.configure(options(metadata_compat="2.14"))
    group = td.new_group(backend="gloo")
    for name, (make, worlds) in sharded_states.CASES.items():
        if request["world"] not in worlds:
            continue
        folder = Path(request["directory"]) / f"{name}-{request['world']}"
        by_parts = Path(request["directory"]) / f"{name}-{request['world']}-parts"
        _save_case(folder, make(request["world"]), None)
        if name != "apart":  # torch does not save it
            _save_case(by_parts, make(request["world"]), group)
        say(case=name)
    dcp.close()
    td.barrier()
    os._exit(0)


def _save_case(folder: Path, case: Any, group: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    target = str(folder / "ours" / "step-1")
    if group is None:
        dcp.save({"something": torch.ones(5), "else": 1}, checkpoint_id=target)
    else:
        stock.save({"something": torch.ones(5), "else": 1}, checkpoint_id=target)
    whole = getattr(case, "whole", None)
    expected = sharded_states.in_full(case.state()) if whole is None else whole
    if whole is None:
        stock.save(case.state(), checkpoint_id=str(folder / "stock"))
    if td.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")
    td.barrier()
    slow_writes()
    if group is None:
        response = dcp.async_save(case.state(), checkpoint_id=target)
    else:
        more = {"storage_writer": dcp.LazyStorageWriter(target, options()), "async_stager": dcp.LazyStager(options())}
        response = stock.async_save(case.state(), process_group=group, **more)
    if isinstance(case, sharded_states.Fixed):
        response.staging_completion.result(DEADLINE_S)  # no optimizer of torch writes it: nobody waits for us
    case.step()
    found = response.upload_completion.result(DEADLINE_S)
    response.staging_completion.result(DEADLINE_S)
    _native.clear_faults()
    assert isinstance(found, stock.Metadata)
    td.barrier()


def control(request: dict[str, Any]) -> None:
    """Staging in the background, without a fence, as torch offers it: what the test above would find."""
    begin(request)
    case = sharded_states.fsdp(request["world"])
    folder = Path(request["directory"]) / "control-1"
    folder.mkdir(parents=True)
    torch.save(sharded_states.in_full(case.state()), folder / "expected.pt")
    stepped = threading.Event()
    stage = staging.DefaultStager._stage

    def late(self: Any, *arguments: Any, **more: Any) -> Any:
        assert stepped.wait(DEADLINE_S)
        return stage(self, *arguments, **more)

    staging.DefaultStager._stage = late  # type: ignore[method-assign]
    stager = staging.DefaultStager(staging.StagingOptions(False, False, True, False))
    response = stock.async_save(case.state(), checkpoint_id=str(folder / "ours" / "step-1"), async_stager=stager)
    case.step()
    stepped.set()
    response.upload_completion.result(DEADLINE_S)
    os._exit(0)


# ---- an id that is saved again ---------------------------------------------------------------------------------------


class Again:
    """Saves one id time and again, with what it is in full beside it."""

    def __init__(self, request: dict[str, Any]) -> None:
        begin(request)
        self.request = request
        self.root, self.rank = Path(request["directory"]), request["rank"]
        self.by_parts = request["way"] == "parts"
        limits = {"commit_timeout_s": 3.0 if request["crash_point"] else patience(20.0)}
        dcp.configure(options(**limits))
        self.group = td.new_group(backend="gloo") if self.by_parts else None
        self.trained = sharded_states.fsdp(request["world"])
        for _ in range(request["first"]):
            self.trained.step()

    def run(self) -> None:
        for number in range(self.request["first"], self.request["first"] + self.request["saves"]):
            if number > 0:
                if self.request["crash_point"]:
                    _native.set_crash_point(self.request["crash_point"], 0)
                if self.request["fault"]:
                    _native.set_fault(**self.request["fault"])
            self.save(number)
            _native.clear_faults()

    def save(self, number: int) -> None:
        state = {**self.trained.state(), "number": number}
        expected = sharded_states.in_full(state)
        if self.rank == 0:
            torch.save(expected, self.root / f"expected-{number}.pt")
        td.barrier()
        upload = self._begin(state)
        self.trained.step()
        try:
            upload.result(DEADLINE_S)
            say(durable=number)
        except BaseException as error:  # as that of torch is
            say(failed=number, type=type(error).__name__, text=str(error))

    def _begin(self, state: Any) -> Future[Any]:
        target = str(self.root / "id")
        if not self.by_parts:
            return dcp.async_save(state, checkpoint_id=target).upload_completion  # type: ignore[no-any-return]
        more = {"storage_writer": dcp.LazyStorageWriter(target, options()), "async_stager": dcp.LazyStager(options())}
        found: Any = stock.async_save(state, process_group=self.group, **more)
        return found.upload_completion  # type: ignore[no-any-return]


def again(request: dict[str, Any]) -> None:
    Again({"first": 0, "saves": 1, "crash_point": "", "fault": None, "way": "ours"} | request).run()
    os._exit(0)


# ---- groups, and states that differ ----------------------------------------------------------------------------------


def apart(request: dict[str, Any]) -> None:
    """On 4 ranks: two groups save beside each other, by calls of their own; then each rank for itself."""
    begin(request)
    root, rank = Path(request["directory"]), request["rank"]
    groups = [td.new_group([0, 1]), td.new_group([2, 3])]
    half = rank // 2
    try:
        dcp.save({"w": torch.ones(3)}, checkpoint_id=str(root / "foreign"), process_group=groups[1 - half])
    except ValueError as refused:
        say(refused=str(refused))
    for number in range(2 + half):
        state = {"w": torch.full((70_000,), float(10 * half + number)), "half": half}
        dcp.save(state, checkpoint_id=str(root / f"half-{half}"), process_group=groups[half])
    dcp.save({"w": torch.full((9,), float(rank)), "rank": rank}, checkpoint_id=str(root / f"rank-{rank}"), no_dist=True)
    found = {"w": torch.zeros(70_000), "half": -1}
    dcp.load(found, checkpoint_id=str(root / f"half-{half}"), process_group=groups[half])
    say(half=found["half"], w=found["w"].unique().tolist())
    dcp.close()
    td.barrier()
    os._exit(0)


def unlike(request: dict[str, Any]) -> None:
    """Keys and values that each rank has for itself, and collectives of the training meanwhile."""
    begin(request)
    root, rank = Path(request["directory"]), request["rank"]
    dcp.configure(options())
    trained = sharded_states.fsdp(request["world"])
    group = {"none": None, "world": td.group.WORLD, "own": td.new_group(backend="gloo")}[request["group"]]
    for number in range(3):
        own = {f"rank-{rank}": torch.full((3000,), float(rank)), "number": number}
        state = {**trained.state(), "own": own}
        expected = sharded_states.in_full(trained.state())
        slow_writes()
        response = dcp.async_save(state, checkpoint_id=str(root / "id"), process_group=group)
        for _ in range(20):
            reduced = torch.ones(3)
            td.all_reduce(reduced, group=group)
            assert reduced.tolist() == [2.0] * 3
        trained.step()
        response.upload_completion.result(DEADLINE_S)
        _native.clear_faults()
        td.barrier()
    _check_unlike(root, trained, expected, rank)
    td.barrier()
    os._exit(0)


def _check_unlike(root: Path, trained: Any, expected: Any, rank: int) -> None:
    found = {**trained.state(), "own": {f"rank-{rank}": torch.zeros(3000), "number": -1}}
    dcp.load(found, checkpoint_id=str(root / "id"))
    own = found.pop("own")
    assert own["number"] == 2 and own[f"rank-{rank}"].unique().tolist() == [float(rank)]
    say(error=sharded_states.difference(expected, sharded_states.in_full(found)))


def sharded_tensors(request: dict[str, Any]) -> None:
    """As FSDP1 gives them without a mesh: torch makes these saves."""
    begin(request)
    dcp.configure(options())
    torch.manual_seed(3)
    model = FSDP(torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 30)), device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    target = str(Path(request["directory"]) / "id")

    def step() -> None:
        model(torch.ones(3, 300)).sum().backward()
        optimizer.step()

    def state(kind: StateDictType) -> dict[str, Any]:
        with FSDP.state_dict_type(model, kind):
            return {key: tensor.clone() if kind is StateDictType.FULL_STATE_DICT else tensor
                    for key, tensor in model.state_dict().items()}  # fmt: skip

    for call in (dcp.async_save, dcp.save):
        step()
        expected = state(StateDictType.FULL_STATE_DICT)
        response = call(state(StateDictType.SHARDED_STATE_DICT), checkpoint_id=target)
        step()
        if call is dcp.async_save:
            response.upload_completion.result(DEADLINE_S)
        found = state(StateDictType.SHARDED_STATE_DICT)
        say(kind=type(next(iter(found.values()))).__name__)
        dcp.load(found, checkpoint_id=target)
        with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            model.load_state_dict(found)
        now = state(StateDictType.FULL_STATE_DICT)
        say(same=[key for key, tensor in now.items() if torch.equal(tensor, expected[key])] == list(now))
    td.barrier()
    os._exit(0)


# ---- what goes wrong on one rank -------------------------------------------------------------------------------------


class Failing:
    """Gives no state on rank 1."""

    def __init__(self, rank: int, error: BaseException) -> None:
        self.rank, self.error = rank, error

    def state_dict(self) -> dict[str, Any]:
        if self.rank == 1:
            raise self.error
        return {"x": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def lonely(request: dict[str, Any]) -> None:
    """Rank 1 has errors of its own: all ranks hear of each, and go on. Nothing is waited for in a collective of torch."""
    begin(request)
    root, rank = Path(request["directory"]), request["rank"]
    dcp.configure(options())
    trained = sharded_states.fsdp(request["world"])
    state = {**trained.state(), "number": 1}
    expected = sharded_states.in_full(state)
    dcp.save(state, checkpoint_id=str(root / "id"))
    for error in (RuntimeError("no state today"), KeyboardInterrupt("now")):
        for call in (dcp.save, dcp.async_save):
            try:
                call({"what": Failing(rank, error), "number": 2}, checkpoint_id=str(root / "id"))
            except BaseException as found:
                say(raised=type(found).__name__, text=str(found))
    _check(root / "id", trained, expected)
    _damage(root, rank, "__1_*.distcp")
    _try_to_load(root / "id", trained)
    _damage(root, rank, ".metadata")
    _try_to_load(root / "id", trained)
    dcp.save(state, checkpoint_id=str(root / "id"))
    _check(root / "id", trained, expected)
    dcp.close()
    td.barrier()
    os._exit(0)


def _check(path: Path, trained: Any, expected: Any) -> None:
    trained.step()
    found = {**trained.state(), "number": -1}
    dcp.load(found, checkpoint_id=str(path))
    say(error=sharded_states.difference(expected, sharded_states.in_full(found)))


def _damage(root: Path, rank: int, name: str) -> None:
    td.barrier()
    if rank == 0:
        (path,) = (root / "id").glob(name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    td.barrier()


def _try_to_load(path: Path, trained: Any) -> None:
    try:
        dcp.load({**trained.state(), "number": -1}, checkpoint_id=str(path))
    except BaseException as found:
        say(raised=type(found).__name__, text=str(found))


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    globals()[request["work"]](request)
    os._exit(0)
