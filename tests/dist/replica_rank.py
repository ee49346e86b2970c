"""One rank of a job whose replicated state may differ between the ranks; test_replicas.py starts it.

It reports on its standard output, one line of JSON in one write for each save, and one for what it has restored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from support import patience

import ckpt
from ckpt.integrations.torch import CheckpointCallback


def options(**changes: Any) -> ckpt.Options:
    small: dict[str, Any] = {"arena_bytes": "4MiB", "chunk_bytes": "64KiB", "writers": 2, "eager_bytes": "4KiB"}
    waits = {"timeout_s": patience(60), "drain_timeout_s": patience(60), "commit_timeout_s": patience(20), "max_failed_saves": 0}
    return ckpt.Options(**(small | waits | changes))


def say(**fields: Any) -> None:
    os.write(1, (json.dumps(fields) + "\n").encode())


def weights(step: int) -> dict[str, torch.Tensor]:
    """The same on every rank: a little of everything, so that what differs lies anywhere in the file."""
    sizes = {"small": 10, "odd": 1025, "large": 150_001}
    return {name: torch.randn(size, generator=torch.Generator().manual_seed(step)) for name, size in sizes.items()}


class Tensors:
    """What keeps tensors of its own, as an average or statistics do; no module, whose buffers would be the rank's own."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            self.tensors[name].copy_(tensor)


def differing(request: dict[str, Any], rank: int) -> dict[str, torch.Tensor]:
    """
    Args:
        request: `elements` of each tensor; `only`: the one element that differs, else all do; `odd`: the rank that does.
    """
    x = torch.arange(request["elements"], dtype=torch.float32)
    if rank == request["odd"]:
        only = request["only"]
        x[slice(None) if only is None else only] += 1
    if request["batch_norm"]:
        norm = torch.nn.BatchNorm1d(request["elements"])
        norm.running_mean = x
        return dict(norm.state_dict())
    return {"same": torch.ones(5), "x": x}


def save_by_checkpointer(request: dict[str, Any], state: Callable[[int], dict[str, torch.Tensor]]) -> None:
    with ckpt.Checkpointer(request["directory"], options=options(**request["options"]), coordinator="file") as checkpointer:
        for step in range(3):
            replicated = {"model": weights(step), "extra": {"stats": state(step)}, "weights": list(weights(step).values())}
            if request["padding"]:  # a pickle that several ranks write; digests leave out the names of devices
                replicated["device"] = f"cuda:{request['rank'] if step == 1 else 0}"
                replicated["padding"] = list(range(request["padding"]))
            report(step, checkpointer.save(step, {"rank": request["rank"]}, replicated=replicated, lazy=request["lazy"]))
            if step == 1:
                say(restored=restored(checkpointer))
        forgive(checkpointer)


def save_by_callback(request: dict[str, Any], state: Callable[[int], dict[str, torch.Tensor]]) -> None:
    torch.manual_seed(0)
    stats = Tensors(state(0))
    with CheckpointCallback(
        request["directory"],
        model=torch.nn.Linear(300, 400),
        extra={"stats": stats},
        options=options(**request["options"]),
        coordinator="file",
    ) as callback:
        for step in range(3):
            stats.tensors = state(step)
            pending = callback.step(step)
            assert pending is not None
            report(step, pending)
            if step == 1:
                say(restored=restored(callback.checkpointer))
        forgive(callback.checkpointer)


def restored(checkpointer: ckpt.Checkpointer) -> Any:
    """The step that is found, or why none is."""
    try:
        found = checkpointer.restore()
    except ckpt.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    assert found is not None
    return found.step


def report(step: int, pending: ckpt.PendingSave) -> None:
    error = pending.exception()
    say(step=step, kind=type(error).__name__ if error else None, text=str(error or ""), ranks=getattr(error, "ranks", None))


def forgive(checkpointer: ckpt.Checkpointer) -> None:
    checkpointer._unreported = checkpointer._last_failed = None


def main(request: dict[str, Any]) -> None:
    defaults = {"odd": 1, "only": None, "batch_norm": False, "options": {}, "callback": False, "lazy": None, "elements": 1000}
    defaults |= {"padding": 0}
    request = defaults | request
    rank = request["rank"]
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(request["world"])
    torch.set_num_threads(1)
    save = save_by_callback if request["callback"] else save_by_checkpointer
    save(request, lambda step: differing(request, rank if step == 1 else -1))
    os._exit(0)
