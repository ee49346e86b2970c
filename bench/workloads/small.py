"""How long a small save takes until it is durable, such as an adapter's: nearly all of that is fsyncs and renames."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ckpt
from bench.measure.report import Report
from bench.measure.sampling import MIB, Sample, Settings, Side, Values, clock, interleave
from bench.rivals.torch_save import torch_save_durable
from bench.workloads.sizes import equal
from bench.workloads.training import bytes_of

TENSORS = 100
KEEP = 2
ROUNDS = 30

HOW_STEP = "clock from the call of Checkpointer.save() to the return of result(): a step with its manifest; an old one goes"
HOW_FILE = "clock from the call of ckpt.save() to the return of result(): a file that replaces the one before"
HOW_TORCH = "clock around open, torch.save, flush, os.fsync; a new file each time"
HOW_SAFE = "the same to a temporary file, os.rename over the one before, os.fsync of the directory"


class Bench:
    """The state, and the ways of saving it."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.state = equal(TENSORS, settings.sized(MIB))
        self.nbytes = bytes_of(self.state)
        self.directory = directory
        self.checkpointer = ckpt.Checkpointer(directory / "ckpt", keep=KEEP)
        self._steps = 0

    def step(self) -> Values:
        return self._ours(partial(self.checkpointer.save, self._steps, self.state))

    def file(self) -> Values:
        return self._ours(partial(ckpt.save, self.state, self.directory / "file.pt"))

    def _ours(self, save: Callable[[], ckpt.PendingSave]) -> Values:
        self._steps += 1
        started = clock()
        pending = save()
        saved = clock()
        pending.result()
        return {"durable_s": clock() - started, "save_s": saved - started}

    def torch_save(self) -> Values:
        path = self.directory / "torch.pt"
        started = clock()
        torch_save_durable(self.state, path)
        durable_s = clock() - started
        path.unlink()
        return {"durable_s": durable_s}

    def torch_save_safely(self) -> Values:
        """As much as a file of ours: the one before stands until this one is whole, and its name lasts."""
        path, aside = self.directory / "safe.pt", self.directory / "safe.tmp"
        started = clock()
        torch_save_durable(self.state, aside)
        os.rename(aside, path)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return {"durable_s": clock() - started}


def measure_small(settings: Settings, report: Report) -> None:
    with settings.workspace() as directory:
        bench = Bench(settings, directory)
        hows: dict[str, tuple[Callable[[], Values], str]] = {
            "ckpt, a step": (bench.step, HOW_STEP),
            "ckpt, a file": (bench.file, HOW_FILE),
            "torch.save + fsync": (bench.torch_save, HOW_TORCH),
            "torch.save + fsync + rename + fsync of the directory": (bench.torch_save_safely, HOW_SAFE),
        }
        sides = [Side(name, measure) for name, (measure, _) in hows.items()]
        samples = interleave(sides, settings.rounds_or(ROUNDS), settings.settle, warmup=3)
        bench.checkpointer.close()
    for name, found in samples.items():
        detail: dict[str, Any] = {"tensors": TENSORS}
        if name.startswith("ckpt"):
            saves = [sample.values["save_s"] for sample in found]
            detail["save_s"] = sorted(saves)[len(saves) // 2]
        only = [Sample(sample.started_s, {"durable_s": sample.values["durable_s"]}) for sample in found]
        report.add("small", name, "s", only, nbytes=bench.nbytes, how=hows[name][1], **detail)
    safe = samples["torch.save + fsync + rename + fsync of the directory"]
    for name in ("ckpt, a step", "ckpt, a file"):
        case = f"{name} / torch.save, as safe"
        report.add_ratio("small", case, samples[name], safe, how="times of both", nbytes=bench.nbytes)
