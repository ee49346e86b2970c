"""One of two ranks that train a sharded model and save each step; killed, with a full disk, or without a word.

It reports on its standard output, a line each:

    found <step> <digest of what torch reads from that step>
    durable <step> <digest of the state that was saved>
    failed <step> <type of the error>: <text>
    layout <step> <bytes that were sent to rank 0 to say where things lie>
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from dist import sharded_states
from support import DEADLINE_S, options, patience

import ckpt
from ckpt import _native
from ckpt.commit import layout_exchange
from ckpt.commit.layout_exchange import LayoutExchange


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def digest(state: Any) -> str:
    """Of a state in full."""
    found = hashlib.sha256()
    for tensor in sharded_states.tensors_of(state):
        found.update(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()))
    return found.hexdigest()[:16]


class Trainer:
    """
    Args:
        request: directory, meeting, rank, world, first, steps; `port` of the store of somebody else, instead of a file;
            crash_point and crash_skip; `plan`: for each step, by its number as a text, what this rank does differently;
            `patience`: leave after so many failures.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(request["rank"]), str(request["world"])
        world = {"rank": request["rank"], "world_size": request["world"]}
        if request["port"]:
            td.init_process_group("gloo", store=td.TCPStore("127.0.0.1", request["port"], is_master=False), **world)
        else:
            td.init_process_group("gloo", init_method=f"file://{request['meeting']}", **world)
        self.request, self.failures, self.waiting = request, 0, []
        self.trained = sharded_states.fsdp(request["world"])
        changes = {"commit_timeout_s": patience(20.0), "max_failed_saves": 0} | request["options"]
        self.checkpointer = ckpt.Checkpointer(request["directory"], keep=None, options=options(**changes), coordinator="torch")
        self._count_layouts()

    def _count_layouts(self) -> None:
        say_layout = LayoutExchange.say

        def counted(exchange: LayoutExchange, layout: str) -> layout_exchange.LayoutWord:
            word = say_layout(exchange, layout)
            say(f"layout {len(word.digest) + len(word.text)}")
            return word

        LayoutExchange.say = counted  # type: ignore[method-assign]

    def look(self) -> None:
        """What torch finds in the newest step, and what restore() says of all the files."""
        found = self.checkpointer.restore()
        if found is None:
            return say("found -1 -")
        state = sharded_states.fsdp(self.request["world"]).state()
        dcp.load(state, checkpoint_id=str(Path(self.request["directory"]) / f"step-{found.step:012d}"))
        say(f"found {found.step} {digest(sharded_states.in_full(state))}")

    def run(self) -> None:
        self.look()
        _native.set_crash_point(self.request["crash_point"], self.request["crash_skip"])
        for step in range(self.request["first"], self.request["first"] + self.request["steps"]):
            self.save(step, **self.request["plan"].get(str(step), {}))
            if self.failures >= self.request["patience"]:
                return
        try:
            self.checkpointer.close()
        except ckpt.CheckpointError:
            pass

    def save(self, step: int, fault: Any = None, own: Any = None, drop: str | None = None, twice: bool = False,
             forget: bool = False, grow: int = 0, sleep_s: float = 0.0, still: bool = False) -> None:  # fmt: skip
        state = self.trained.state()
        state["progress"] |= {"step": step, "list": [0] * grow} | ({} if own is None else {"own": own})
        if drop is not None:
            del state[drop]
        expected = digest(sharded_states.in_full(state)) if not self.request["plan"] else "-"
        if fault:
            _native.set_fault(**fault)
        time.sleep(sleep_s)
        if forget:
            self.checkpointer._layouts._known.clear()
        try:
            for _ in range(1 + twice):
                pending = self.checkpointer.save(step, sharded=state)
                if not still:
                    self.trained.step()
                pending.result(DEADLINE_S)
                if twice:
                    state = self.trained.state()
            say(f"durable {step} {expected}")
        except Exception as error:
            self.failures += 1
            say(f"failed {step} {type(error).__name__}: {error}")
        finally:
            _native.clear_faults()


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    defaults = {"first": 0, "steps": 3, "crash_point": "", "crash_skip": 0, "plan": {}, "options": {}, "patience": 1000, "port": 0}
    Trainer(defaults | request).run()
    os._exit(0)
