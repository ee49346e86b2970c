"""How long until a checkpoint is on the GPU again, beside others, the disk and the link."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import ckpt
from bench.gpu.device import Device, Watch
from bench.gpu.rivals import DCP, TORCH
from bench.gpu.setup import Bench, check_file, same_bytes, tensors_of
from bench.measure.direct_reads import DirectReads, write_direct
from bench.measure.disk_pages import forget_pages
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, MIB, Samples, Settings, Side, Values, clock, column, interleave
from bench.rivals.torch_save import torch_save_durable
from bench.workloads.restore import best_limits, fio_rate

OURS, INTO = "ckpt.load", "ckpt.load_into"
LINK = "pinned limit, to the device"
LOOKED_AT_BYTES = 2 * GIB  # at most, when the disk's limit is looked for
BAR = Bar(">=", 0.9)
HOW = (
    "clock around the call until the device has all tensors; the file's pages have been dropped from the page cache before, as "
    "far as the kernel does that when asked"
)
HOW_MEMORY = "of the host, over what was taken before the call: resident set, looked at every 10 ms"
HOW_LINK = "one pinned block of at most 2 GiB, copied to the device as often as the state is larger: by events on the device"
HOW_DISK = "direct reads of a file of at most 2 GiB: as fio reports it, or by the clock of the loop that stands in for fio"
THREADS, BLOCK_BYTES = (1, 4), 4 * MIB  # of that loop


def measure_restore(bench: Bench, directory: Path, report: Report) -> None:
    """How long until the state is on the device again."""
    settings = bench.settings
    looked_at = min(bench.nbytes, LOOKED_AT_BYTES)
    limits = disk_limits(settings, directory / "limit", looked_at)
    ways = ways_of(bench, directory)
    sides = [Side(name, partial(restore, bench, path, load)) for name, (path, load) in ways.items()]
    sides += [Side(name, measure) for name, measure in limits.items()]
    sides += [Side(LINK, partial(bench.pinned_rate, to_device=True))]
    samples = interleave(sides, settings.rounds_or(3), settings.settle)
    add_restore(bench, report, samples, list(ways), list(limits))


def disk_limits(settings: Settings, path: Path, nbytes: int) -> dict[str, Callable[[], Values]]:
    """By name what measures a limit for reading the disk: by fio, or, without it, by a loop of this program."""
    if settings.fio_grid:
        return {name: partial(fio_rate, each, path, nbytes) for name, each in best_limits(settings, path, nbytes).items()}
    write_direct(path, nbytes)
    loops = [DirectReads(path, nbytes, threads, BLOCK_BYTES) for threads in THREADS]
    return {loop.name: partial(loop_rate, loop) for loop in loops}


def loop_rate(loop: DirectReads) -> Values:
    return {"rate_GBps": loop.run() / 1e9}


def ways_of(bench: Bench, directory: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """By name the file, which is written, and what brings it back."""
    device = bench.device
    (rival, *_) = bench.ours(directory)
    stock, sharded = directory / "torch.pt", directory / "dcp"
    state = bench.trainer.state()
    rival.save(state)
    rival.finish()
    ours = rival.newest
    torch_save_durable(state, stock)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(sharded))
    check_file(ours, list(tensors_of(state)), device)
    check_loaded(bench, ckpt.load(ours, device.map_location), state)
    check_loaded(bench, load_into(ours, state), state)
    to_device: dict[str, Any] = {"map_location": device.torch_device}
    return {
        OURS: (ours, lambda: ckpt.load(ours, device.map_location)),
        INTO: (ours, lambda: load_into(ours, state)),
        "torch.load of the same file": (ours, lambda: torch.load(ours, weights_only=True, **to_device)),
        f"torch.load of {TORCH}": (stock, lambda: torch.load(stock, weights_only=True, **to_device)),
        f"{DCP}, load": (sharded, lambda: load_sharded(sharded, state)),
    }


def check_loaded(bench: Bench, found: Any, state: Any) -> None:
    """A fast load of something else is worth nothing."""
    for number, (there, here) in enumerate(zip(tensors_of(found), tensors_of(state), strict=True)):
        if there.device != here.device or not same_bytes(there, here):
            raise AssertionError(f"tensor {number} is not what it was, or not on {bench.device.torch_device}")


def restore(bench: Bench, path: Path, load: Callable[[], Any]) -> Values:
    device: Device = bench.device
    forget_pages(path)
    device.synchronize()
    with Watch(device) as watch:
        started = clock()
        loaded = load()
        device.synchronize()
        restore_s = clock() - started
    del loaded
    return {"restore_s": restore_s, "rate_GBps": bench.nbytes / restore_s / 1e9, "host_peak_MiB": watch.host_bytes / MIB}


def load_into(path: Path, like: Any) -> Any:
    target = empty_like(like)
    ckpt.load_into(path, target)
    return target


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


def add_restore(bench: Bench, report: Report, samples: Samples, ways: list[str], limits: list[str]) -> None:
    add, add_ratio = bench.adder(report), bench.ratio_adder(report)
    for name in ways:
        add(name, "s", samples[name], how=HOW)
        add(name, "MiB", column(samples[name], "host_peak_MiB"), how=HOW_MEMORY)
    add(LINK, "GB/s", samples[LINK], how=HOW_LINK)
    for name in limits:
        add(name, "GB/s", samples[name], how=HOW_DISK)
    for name in ways[2:]:
        add_ratio(f"{OURS} / {name}", samples[OURS], samples[name], how="restore_s of both; only ours verifies CRC-32s")
    if limits:
        best = max(limits, key=lambda name: rate_of(samples, name))
        slower = min(best, LINK, key=lambda name: rate_of(samples, name))
        for name in (OURS, INTO):
            rates, bar = column(samples[name], "rate_GBps"), BAR
            add_ratio(f"{name} / min(disk, link)", rates, samples[slower], how=f"rates; the lower one is {slower}", bar=bar)


def rate_of(samples: Samples, name: str) -> float:
    return statistics.median(sample.main for sample in samples[name])
