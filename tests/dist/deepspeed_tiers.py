"""More modes of deepspeed_training.py: saves by way of the disks of nodes. A node is a directory of each rank's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm
from dist import deepspeed_training
from dist.deepspeed_behaviour import error_of, kept, warnings
from dist.deepspeed_models import Case, Training, build
from dist.deepspeed_training import DEADLINE_S, SMALL, digest, read

import ckpt
import ckpt.integrations.deepspeed as lazy
from ckpt import _native
from ckpt.directory.publish_lock import publishing


def started(case: Case, directory: Path) -> Training:
    lazy.enable()
    tier = {"node": str(directory.with_name(f"node-{comm.get_rank()}")), "address": "127.0.0.1"}
    training = Training(case, build(case, SMALL | {"host_cache_size": 1 / 256, "tiers": [tier]} | case.options))
    training.advance()
    return training


def save_by_nodes(case: Case, directory: Path) -> dict[str, Any]:
    """Two saves; the second lands on the nodes while nothing can come home. Then it is over at once, as by a kill."""
    training = started(case, directory)
    training.save(str(directory), "one")
    lazy.wait(training.engine, DEADLINE_S)
    training.advance()
    comm.barrier()
    if comm.get_rank() == 0:
        hold_home(directory)
    comm.barrier()
    if case.crash_point and comm.get_rank() == case.crash_rank:
        _native.set_crash_point(case.crash_point)
    expected = digest(training.state())
    training.save(str(directory), "two")
    training.advance()  # over the training all goes on
    landed = error_of(lambda: lazy.wait(training.engine, DEADLINE_S, tier="node"))
    late = error_of(lambda: lazy.wait(training.engine, 0.1))
    return {
        **{"saved": expected, "landed": landed, "late": late, "latest": read(directory / "latest")},
        "at_home": sorted(path.name for path in directory.glob("two/*")),
    }


def hold_home(directory: Path) -> None:
    """Until this process ends."""
    (directory / ".drain").mkdir()
    kept.append(publishing(directory, "test"))
    kept[-1].__enter__()


def load_by_nodes(case: Case, directory: Path) -> dict[str, Any]:
    """As a job that is started again; `load_tag`: what it asks for. Saves once more, home."""
    training = started(case, directory)
    places: list[str] = []
    stock = ckpt.load

    def load(path: Any, **how: Any) -> Any:
        places.append("home" if Path(path).is_relative_to(directory) else "node")
        return stock(path, **how)

    ckpt.load = load
    found: list[str | None] = []
    with warnings() as logged:
        error = error_of(lambda: found.append(training.load(str(directory), case.load_tag or None)))
    ckpt.load = stock
    state = digest(training.state())
    if error is None:
        training.advance()
        training.save(str(directory), "three")
        training.advance()
        lazy.wait(training.engine, DEADLINE_S)
    return {
        **{"error": error, "path": Path(found[0] or "").parent.name if found else None, "found": state, "logged": logged},
        **{"places": sorted(set(places)), "latest": read(directory / "latest")},
    }


def load_stock(case: Case, directory: Path) -> dict[str, Any]:
    """By DeepSpeed's own engine, which knows nothing of nodes."""
    training = Training(case, build(case, None))
    assert type(training.engine.checkpoint_engine).__module__.startswith("deepspeed.")
    path = training.load(str(directory), case.load_tag or None)
    names = sorted(name for name in os.listdir(directory / "two"))
    return {"path": path and Path(path).parent.name, "found": digest(training.state()), "names": names, "torch": torch.__version__}


MODES = (save_by_nodes, load_by_nodes, load_stock)
deepspeed_training.MODES.update({mode.__name__: mode for mode in MODES})
