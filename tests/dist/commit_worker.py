"""One rank of a job that trains a toy model and saves every step together with the others; test_commit.py starts it.

It reports on its standard output, one line each, each in one write:

    found <step> <digest of the replicated state> <step of its own state>     what restore() gave; -1 - -1 if nothing
    landed <step> <directory>                                                 it is on the disks of the nodes
    carried <step> <URL>                                                      it is in the object store
    durable <step>
    failed <step> <type of the error>: <text>
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import nursery
import torch
from crash_child import Trainer, digest
from support import patience

import ckpt
from ckpt import _native, torch_private

COMMIT_TIMEOUT_S = patience(20.0)  # where nobody is missed
SHORT_S = 1.0  # where somebody is


def options(**changes: Any) -> ckpt.Options:
    small: dict[str, Any] = {"arena_bytes": "4MiB", "chunk_bytes": "64KiB", "writers": 2, "eager_bytes": "4KiB"}
    waits = {"timeout_s": 60.0, "drain_timeout_s": 60.0, "commit_timeout_s": COMMIT_TIMEOUT_S, "max_failed_saves": 0}
    return ckpt.Options(**(small | waits | changes))


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def own_state(rank: int, step: int) -> dict[str, Any]:
    return {"rank": rank, "step": step, "data": torch.full((20_000,), rank * 1000.0 + step)}


def merge(states: list[Any]) -> dict[str, Any]:
    """For another number of ranks."""
    assert [state["rank"] for state in states] == list(range(len(states)))
    return {"rank": -1, "step": states[0]["step"], "data": torch.stack([state["data"] for state in states])}


def tiers_of(request: dict[str, Any]) -> list[ckpt.Tier]:
    tiers = [ckpt.Tier.node(request["node"], **request["tier"])] if request["node"] else []
    return tiers + ([ckpt.Tier.remote(**request["remote"])] if request["remote"] else [])


class Rank:
    """
    Args:
        request: directory, rank, world, steps, keep; `environment`: variables beside rank and world; `at`: the step to
            resume from; crash_point and crash_skip; `patience`: leave after so many failures, without another word to the
            others; `plan`: for each step, by its number as a text, what this rank does differently.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(request["rank"]), str(request["world"])
        os.environ.update(request["environment"])
        self.request = request
        if request["coordinator"] == "torch":
            where = f"tcp://127.0.0.1:{request['port']}"
            torch.distributed.init_process_group("gloo", init_method=where, rank=request["rank"], world_size=request["world"])
        self.failures = 0
        self.trainer = Trainer()
        self.checkpointer = ckpt.Checkpointer(
            request["directory"],
            keep=request["keep"],
            options=options(**request["options"]),
            coordinator=request["coordinator"],
            tiers=tiers_of(request),
        )
        assert (self.checkpointer.rank, self.checkpointer.world_size) == (request["rank"], request["world"])

    def resume(self) -> None:
        found = self.checkpointer.restore(step=self.request["at"], merge=merge)
        if found is None:
            return say("found -1 - -1")
        self.trainer.resume(found.replicated)
        assert self.trainer.step == found.step
        assert found.state["rank"] in (self.checkpointer.rank, -1)
        say(f"found {found.step} {digest(found.replicated)} {found.state['step']}")

    def run(self) -> None:
        try:
            self.resume()
        except ckpt.CheckpointError as error:
            if self.request["at"] is None:
                raise
            return say(f"refused {type(error).__name__}: {error}")
        _native.set_crash_point(self.request["crash_point"], self.request["crash_skip"])
        for _ in range(self.request["steps"]):
            self.trainer.advance()
            self.save(self.trainer.step, **self.request["plan"].get(str(self.trainer.step), {}))
            if self.failures >= self.request["patience"]:
                return self.leave()
        try:
            self.checkpointer.close()
        except ckpt.CheckpointError as error:
            say(f"closed {type(error).__name__}")

    def leave(self) -> None:
        """Rank 0 may have the store in its process: it stays until the others have heard its last word. One of them is dead."""
        if self.request["coordinator"] != "torch":
            return
        store = torch_private.default_store()
        with contextlib.suppress(RuntimeError):  # rank 0 is dead, and the store with it
            left = store.add("left", 1)
            while self.checkpointer.rank == 0 and left < self.checkpointer.world_size - 1:
                time.sleep(0.01)
                left = store.add("left", 0)

    def save(self, step: int, fault: Any = None, sleep_s: float = 0, differ: Any = None, as_step: int | None = None,
             unpicklable: bool = False, twice: bool = False, lazy: Any = None) -> None:  # fmt: skip
        own, replicated = own_state(self.checkpointer.rank, step), self.trainer.state()
        if fault:
            _native.set_fault(**fault)
        if differ is not None:
            replicated["differs"] = differ
        if unpicklable:
            own["bad"] = (lambda: None,)
        time.sleep(sleep_s)
        try:
            pending = self.checkpointer.save(step if as_step is None else as_step, own, replicated=replicated, lazy=lazy)
            if twice:
                pending = self.checkpointer.save(step, own, replicated=replicated)
            if self.request["node"] and pending.on_tier("node").exception() is None:
                say(f"landed {step} {pending.on_tier('node').result()}")
            if self.request["remote"] and pending.on_tier("object").exception() is None:
                say(f"carried {step} {pending.on_tier('object').result()}")
            if self.request["wait"]:
                pending.exception()
        except Exception as error:
            return say(f"failed {step} {type(error).__name__}: {error}")
        finally:
            if fault:
                _native.clear_faults()
        self.newest = pending
        pending.add_done_callback(lambda _: self.report(step, pending.exception()))

    def report(self, step: int, error: BaseException | None) -> None:
        self.failures += error is not None
        if error is None:
            say(f"wrote {self.newest.stats.bytes_total}")
        say(f"durable {step}" if error is None else f"failed {step} {type(error).__name__}: {error}")


def run(request: dict[str, Any]) -> None:
    defaults = {"keep": None, "steps": 3, "crash_point": "", "crash_skip": 0, "plan": {}, "options": {}}
    defaults |= {"coordinator": "file", "environment": {}, "wait": True, "patience": 1000}
    defaults |= {"at": None, "node": None, "tier": {}, "remote": {}}
    Rank(defaults | request).run()


def main(request: dict[str, Any]) -> None:
    run(request)
    os._exit(0)


def main_under_mpirun(each: list[dict[str, Any]], log: str, finalize: bool) -> None:
    """One of the ranks that mpirun has started.

    Args:
        each: for each rank its request.
        log: what rank r says goes to `<log>-<r>`: of a job that is ended, mpirun may lose the last words. Its pid comes first,
            and "ended" last.
        finalize: ends MPI in good order, which needs all ranks alive.
    """
    nursery.warm_up()  # before the ranks meet: afterwards one would wait for the other, and might miss it
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    os.dup2(os.open(f"{log}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    say(f"pid {os.getpid()}")
    run(each[rank])
    say("ended")
    if not finalize:
        os._exit(0)
