"""What the parts of the GPU benchmark share: the device, the job on it, and ways of saving it with ckpt."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ckpt
from bench.gpu.device import Device
from bench.gpu.rivals import CkptFile
from bench.gpu.training import GpuTrainer
from bench.measure.report import Report
from bench.measure.sampling import GIB, MIB, Settings, Values
from bench.workloads.training import bytes_of

PARAMETERS = 1_000_000_000
PINNED_BYTES = 2 * GIB  # of the block that is copied to when the limit is looked for
ARENA_OVER_STATE = 1.02  # headers and the ends of chunks need a little
OURS, DEFAULT_ARENA = "ckpt", "ckpt, default arena"


class Bench:
    """The device, the training job on it, and the ways of saving it.

    Attributes:
        workload: the name that results go by; that of a stand-in says so.
        copy_s: what copying the whole state to pinned memory takes, at least.
    """

    def __init__(self, settings: Settings, device: Device) -> None:
        self.settings, self.device = settings, device
        self.workload = "gpu, STAND-IN" if device.stand_in else "gpu"
        self.trainer = GpuTrainer(settings.sized(PARAMETERS), device)
        self.nbytes = bytes_of(self.trainer.state())
        self.copy_s = self.nbytes / max(self.pinned_rate()["rate_GBps"] for _ in range(2)) / 1e9
        self._files = 0

    def chosen(self, name: str) -> bool:
        """Whether --rivals has a part of this name."""
        return not self.settings.rivals or any(part in name for part in self.settings.rivals)

    def variants(self) -> dict[str, ckpt.Options]:
        """ckpt with room for the whole state in its arena; with the default; with less, and a cache on the device besides."""
        full = math.ceil(ARENA_OVER_STATE * self.nbytes) + 64 * MIB
        small = max(MIB, self.nbytes // 4)
        full_options = ckpt.Options(device_lazy=True, arena_bytes=full)
        found = {
            OURS: full_options,
            DEFAULT_ARENA: ckpt.Options(device_lazy=True),
            "ckpt, small arena": ckpt.Options(device_lazy=True, arena_bytes=small),
        }
        cache = max(self.nbytes // 2, 4 * full_options.size("chunk_bytes"))
        found["ckpt, small arena, device cache"] = dataclasses.replace(found["ckpt, small arena"], device_cache=cache)
        return {name: options for name, options in found.items() if name == OURS or self.chosen(name)}

    def ours(self, directory: Path) -> list[CkptFile]:
        """The variants, each with a directory of its own in this one, where it keeps nothing."""
        model, variants = self.trainer.model, self.variants().items()
        return [CkptFile(directory / f"ckpt{i}", name, options, model) for i, (name, options) in enumerate(variants)]

    def describe_job(self) -> dict[str, Any]:
        trainer = self.trainer
        tokens = {"sequences": trainer.sequences, "context": trainer.context}
        return {"parameters": trainer.parameters, "state_bytes": self.nbytes, **trainer.shape._asdict(), **tokens}

    def path(self, directory: Path) -> Path:
        self._files += 1
        return directory / f"{self._files}.pt"

    def pinned_rate(self, to_device: bool = False) -> Values:
        """What the link gives to a program that does nothing else."""
        block = min(self.nbytes, PINNED_BYTES)
        source = torch.ones(block, dtype=torch.uint8, device=self.device.torch_device)
        target = self.device.pinned(block)
        if to_device:
            source, target = target, source
        blocks = math.ceil(self.nbytes / block)
        self.device.synchronize()
        begin = self.device.mark()
        for _ in range(blocks):
            target.copy_(source, non_blocking=True)
        end = self.device.mark()
        self.device.synchronize()
        return {"rate_GBps": blocks * block / self.device.seconds_between(begin, end) / 1e9}

    def adder(self, report: Report) -> Callable[..., dict[str, Any]]:
        return partial(report.add, self.workload, nbytes=self.nbytes, judged=not self.device.stand_in)

    def ratio_adder(self, report: Report) -> Callable[..., dict[str, Any]]:
        return partial(report.add_ratio, self.workload, nbytes=self.nbytes, judged=not self.device.stand_in)


def used(rival: CkptFile) -> dict[str, Any]:
    """What a reader must know of it."""
    options = rival.options
    cache = getattr(options, "device_cache", None)
    return {"arena_bytes": options.arena_bytes, "arena_pinned": rival.arena_pinned, "device_cache": cache}


def medians_of(stats: Sequence[ckpt.SaveStats]) -> Values:
    """The library's own account; what it says of instants is left out."""
    rows = [dataclasses.asdict(each) for each in stats]
    names = [name for name, value in rows[0].items() if isinstance(value, (int, float)) and not name.endswith("_at")]
    return {name: float(statistics.median(float(row[name] or 0) for row in rows)) for name in names}


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for child in state.values() if isinstance(state, dict) else state:
            yield from tensors_of(child)


def check_file(path: Path, expected: Sequence[torch.Tensor], device: Device) -> None:
    """A fast save of something else is worth nothing."""
    found = tensors_of(torch.load(path, mmap=True, weights_only=True, map_location="cpu"))
    for number, (there, here) in enumerate(zip(found, expected, strict=True)):
        if not same_bytes(there.to(device.torch_device), here.to(device.torch_device)):
            raise AssertionError(f"tensor {number} of '{path}' is not what it was when it was saved")


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whatever the bits mean: NaNs are equal, too."""
    return a.shape == b.shape and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))
