"""How long until a checkpoint is on the GPU again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from disk_pages import forget_pages
from gpu_bench import Bench, check_file, tensors_of
from gpu_device import Device
from gpu_rivals import DCP, TORCH
from harness import Report, Side, Values, clock, interleave
from rivals import torch_save_durable

import ckpt

HOW = (
    "clock around the call until the device has all tensors; the file's pages have been dropped from the page cache before, as "
    "far as the kernel does that when asked"
)


def measure_restore(bench: Bench, directory: Path, report: Report) -> None:
    """How long until the state is on the device again."""
    device, settings = bench.device, bench.settings
    (saver, *_) = bench.savers()
    ours, stock, sharded = directory / "ckpt.pt", directory / "torch.pt", directory / "dcp"
    state = bench.trainer.state()
    saver.begin(state, ours)
    saver.finish()
    torch_save_durable(state, stock)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(sharded))
    check_file(ours, list(tensors_of(state)), device)
    to_device: dict[str, Any] = {"map_location": device.torch_device}
    ways: dict[str, tuple[Path, Callable[[], Any]]] = {
        "ckpt.load": (ours, lambda: ckpt.load(ours, **to_device)),
        "torch.load of the same file": (ours, lambda: torch.load(ours, weights_only=True, **to_device)),
        f"torch.load of {TORCH}": (stock, lambda: torch.load(stock, weights_only=True, **to_device)),
        f"{DCP}, load": (sharded, lambda: load_sharded(sharded, state)),
    }
    sides = [Side(name, partial(restore, device, path, load)) for name, (path, load) in ways.items()]
    samples = interleave(sides, settings.rounds_or(3), settings.settle)
    for name, found in samples.items():
        bench.adder(report)(name, "s", found, how=HOW)
    add_ratio = bench.ratio_adder(report)
    for name in [name for name in samples if name != "ckpt.load"]:
        add_ratio(
            f"ckpt.load / {name}", samples["ckpt.load"], samples[name], how="restore_s of both; only ours verifies CRC-32s"
        )


def restore(device: Device, path: Path, load: Callable[[], Any]) -> Values:
    forget_pages(path)
    device.synchronize()
    started = clock()
    loaded = load()
    device.synchronize()
    restore_s = clock() - started
    del loaded
    return {"restore_s": restore_s}


def load_sharded(path: Path, like: Any) -> Any:
    """DCP loads in place: into empty tensors of the same shapes, on the device."""
    target = empty_like(like)
    dcp.load(target, storage_reader=dcp.FileSystemReader(path))
    return target


def empty_like(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return torch.empty_like(state)
    if isinstance(state, dict):
        return {key: empty_like(value) for key, value in state.items()}
    return [empty_like(value) for value in state] if isinstance(state, list) else state
