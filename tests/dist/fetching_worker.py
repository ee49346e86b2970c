"""One rank of a job whose checkpoints lie on nodes: saves one, or restores one and tells what it is and where it came from.

The words are a line of JSON on its standard output.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import torch
import torch.distributed as td
from dist import sharded_states
from dist.sharded_trainer import digest
from support import options

import ckpt


def replicated(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"weights": torch.randn(700, 300, generator=generator), "step": step}


def own(rank: int, step: int) -> dict[str, Any]:
    return {"rank": rank, "data": torch.full((30_000,), rank * 1000.0 + step)}


class Rank:
    """
    Args:
        request: directory, node, meeting, rank, world; kinds: what is saved, some of "own", "replicated", "sharded"; steps: to
            be saved; home: whether to wait until they are there; into: whether what is there is filled; tier; options.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.rank, self.world = request["rank"], request["world"]
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(self.rank), str(self.world)
        td.init_process_group("gloo", init_method=f"file://{request['meeting']}", rank=self.rank, world_size=self.world)
        self.kinds = request["kinds"]
        self.trained = sharded_states.fsdp(self.world) if "sharded" in self.kinds else None
        tiers = [ckpt.Tier.node(request["node"], **request["tier"])]
        self.checkpointer = ckpt.Checkpointer(
            request["directory"], keep=None, options=options(**request["options"]), coordinator="torch", tiers=tiers
        )

    def save(self) -> None:
        self.checkpointer.restore(fresh=True)
        for step in self.request["steps"]:
            state: dict[str, Any] = {}
            if "own" in self.kinds:
                state["state"] = own(self.rank, step)
            if "replicated" in self.kinds:
                state["replicated"] = replicated(step)
            if self.trained is not None:
                self.trained.step()
                state["sharded"] = self.trained.state()
            pending = self.checkpointer.save(step, **state)
            pending.on_tier("node").result(60)
            if self.request["home"]:
                pending.result(60)
        self._say(digest=None if self.trained is None else digest(sharded_states.in_full(self.trained.state())))

    def restore(self) -> None:
        arguments: dict[str, Any] = {}
        if self.trained is not None:
            arguments["sharded_into"] = self.trained.state()
        if self.request["into"]:
            arguments["replicated_into"] = {"weights": torch.zeros(700, 300), "step": 0}
        if self.request["merge"]:
            arguments["merge"] = lambda states: states[0]
        found = self.checkpointer.restore(**arguments)
        if found is None:
            return self._say(step=None)
        if found.replicated is not None:
            expected = replicated(found.step)
            assert torch.equal(found.replicated["weights"], expected["weights"]) and found.replicated["step"] == found.step
        if found.state is not None and not self.request["merge"]:
            assert torch.equal(found.state["data"], own(self.rank, found.step)["data"]) and found.state["rank"] == self.rank
        whole = None if found.sharded is None else digest(sharded_states.in_full(found.sharded))
        self._say(step=found.step, digest=whole, sources=dict(found.sources))

    def _say(self, **words: Any) -> None:
        os.write(1, f"{json.dumps(words)}\n".encode())


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    defaults = {"steps": [1], "options": {}, "tier": {}, "into": False, "home": False, "merge": False}
    rank = Rank(defaults | request)
    getattr(rank, request["work"])()
    td.barrier()
    os._exit(0)  # what is not home yet the drain brings
