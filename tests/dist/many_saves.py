"""One of two ranks that save hundreds of times, and say what the process holds after some of them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from dist import sharded_states
from dist.sharded_saves import begin
from support import DEADLINE_S, options, resources

import ckpt
from ckpt.integrations import dcp


class BySteps:
    def __init__(self, directory: Path) -> None:
        self._checkpointer = ckpt.Checkpointer(directory, keep=2, options=options(), coordinator="torch")

    def save(self, number: int, state: Any) -> Any:
        return self._checkpointer.save(number, sharded=state)


class ByDcp:
    """To one id, as the last checkpoint is saved."""

    def __init__(self, directory: Path) -> None:
        dcp.configure(options())
        self._id = str(directory / "id")

    def save(self, number: int, state: Any) -> Any:
        return dcp.async_save(state, checkpoint_id=self._id).upload_completion


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    begin(request)
    way = {"steps": BySteps, "dcp": ByDcp}[request["way"]](Path(request["directory"]))
    case = sharded_states.fsdp(request["world"])
    for number in range(1, request["saves"][-1] + 1):
        state = case.state()
        state["progress"]["step"] = number
        pending = way.save(number, state)
        case.step()
        pending.result(DEADLINE_S)
        del pending, state
        if number in request["saves"]:
            os.write(1, f"{json.dumps(dataclasses.asdict(resources()))}\n".encode())
    os._exit(0)
