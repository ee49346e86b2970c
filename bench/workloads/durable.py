"""How fast bytes become durable, beside what fio finds the disk can do."""

from __future__ import annotations

import dataclasses
import errno
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ckpt
from bench.measure import fio
from bench.measure.direct_writes import DirectLoop
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, MIB, Samples, Settings, Side, Values, clock, interleave, note
from bench.rivals.torch_save import torch_save_durable
from bench.workloads.training import BYTES_PER_PARAMETER, bytes_of, in_huge_pages, state_of
from ckpt import _native

SCREENINGS = 2  # measurements of each configuration, of which the best few go on
FINALISTS = 3
LOOP_GRID = tuple((threads, blocks * MIB) for threads in (1, 2, 4, 8) for blocks in (1, 4, 8))

HOW_CKPT = "clock from the call of save() to the return of result(): data and directory fsynced, renamed; a new file each time"
HOW_TORCH = "clock around open, torch.save, flush, os.fsync; a new file each time"
HOW_FIO = "as fio reports it: first write to last fsync, on a new file that it has allocated before"
HOW_LOOP = "clock from the first write to the end of fdatasync, on a new file that was allocated before"

HUGE = ", huge pages"

Limit = Callable[..., float]  # writes a new file once; returns bytes per second
State = dict[str, dict[str, torch.Tensor]]


class Bench:
    """The state, and the ways of writing it."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.settings = settings
        self.state = state_of(settings.sized(GIB) // BYTES_PER_PARAMETER)
        self.in_huge_pages: State = {}
        self.nbytes = bytes_of(self.state)
        self.path = directory / "state.pt"

    def ckpt_rate(
        self, options: ckpt.Options, *, huge_pages: bool = False, lazy: bool = True, keep_file: bool = False
    ) -> Values:
        state = self.in_huge_pages if huge_pages else self.state
        started = clock()
        pending = ckpt.save(state, self.path, lazy=lazy, options=options)
        pending.result()
        values = {"rate_GBps": self.nbytes / (clock() - started) / 1e9}
        stats = pending.stats
        values |= {"save_s": stats.save_s, "direct_io": float(bool(stats.direct_io))}
        values |= {"bytes_from_tensors": stats.bytes_from_tensors}
        if not keep_file:
            self.path.unlink()
        return values

    def torch_rate(self) -> Values:
        started = clock()
        torch_save_durable(self.state, self.path)
        elapsed = clock() - started
        self.path.unlink()
        return {"rate_GBps": self.nbytes / elapsed / 1e9}

    def check_file(self) -> None:
        """The file must hold the state; a fast write of something else is worth nothing."""
        self.ckpt_rate(ckpt.Options(), keep_file=True)
        loaded = torch.load(self.path, mmap=True, weights_only=True)
        for part, tensors in self.state.items():
            for name, tensor in tensors.items():
                if not torch.equal(tensor, loaded[part][name]):
                    raise AssertionError(f"{part}/{name} came back changed")
        self.path.unlink()


def measure_durable(settings: Settings, report: Report) -> None:
    with settings.workspace() as directory:
        bench = Bench(settings, directory)
        limits = disk_limits(settings, bench.path.with_name("limit"), bench.nbytes)
        screened, failed = screen(limits, settings)
        best = sorted(screened, key=lambda name: -screened[name])[:FINALISTS]
        sides = [Side("ckpt", partial(bench.ckpt_rate, ckpt.Options()))]
        sides += [Side(name, partial(limit_rate, limits[name])) for name in best]
        sides += [
            Side("ckpt, buffered", partial(bench.ckpt_rate, ckpt.Options(direct_io=False))),
            Side("ckpt, copied in save()", partial(bench.ckpt_rate, ckpt.Options(), lazy=False)),
            Side("torch.save + fsync", bench.torch_rate),
        ]
        if settings.fio_grid:
            bench.in_huge_pages = in_huge_pages(bench.state)
            sides.append(Side(f"ckpt{HUGE}", partial(bench.ckpt_rate, ckpt.Options(), huge_pages=True)))
            sides.append(Side(f"{best[0]}{HUGE}", partial(limit_rate, partial(limits[best[0]], huge_pages=True))))
        samples = interleave(sides, settings.rounds_or(7), settings.settle)
        bench.check_file()
    add_durable(report, bench, samples, best, {"screened_GBps": screened, "failed": failed})


def disk_limits(settings: Settings, scratch: Path, nbytes: int) -> dict[str, Limit]:
    """What the disk's limit is looked for with."""
    if settings.fio_grid:
        configs = map(fio.Config.parse, settings.fio_grid)
        return {str(config): partial(fio.run, config, scratch, nbytes) for config in configs}
    loops = [DirectLoop(scratch, nbytes, threads, block) for threads, block in LOOP_GRID]
    return {loop.name: loop.run for loop in loops}


def limit_rate(limit: Limit) -> Values:
    return {"rate_GBps": limit() / 1e9}


def screen(limits: dict[str, Limit], settings: Settings) -> tuple[dict[str, float], dict[str, str]]:
    """A short look at every configuration: ({name: median GB/s}, {name: why it failed}).

    Raises:
        fio.FioError: none works.
    """
    rates: dict[str, list[float]] = {name: [] for name in limits}
    failed: dict[str, str] = {}
    for number in range(SCREENINGS):
        for name, limit in limits.items():
            if name in failed:
                continue
            note(f"looking for the disk's limit, {number + 1}/{SCREENINGS}: {name}")
            settings.settle()
            try:
                rates[name].append(limit() / 1e9)
            except (OSError, fio.FioError) as error:
                failed[name] = str(error)
    found = {name: statistics.median(rates[name]) for name in limits if name not in failed}
    if not found:
        raise fio.FioError(f"nothing can write past the page cache here: {failed}")
    return found, failed


def add_durable(report: Report, bench: Bench, samples: Samples, limits: list[str], detail: dict[str, Any]) -> None:
    medians = {name: statistics.median(sample.main for sample in column) for name, column in samples.items()}
    best = max(limits, key=lambda name: medians[name])
    by_fio = bool(bench.settings.fio_grid)
    for name, column in samples.items():
        extra: dict[str, Any] = detail if name == best else {}
        if name.startswith("ckpt"):
            extra = {"direct_io": column[-1].values["direct_io"], "bytes_from_tensors": column[-1].values["bytes_from_tensors"]}
        report.add("durable", name, "GB/s", column, nbytes=bench.nbytes, how=how_measured(name), **extra)
    ours, add_ratio = samples["ckpt"], partial(report.add_ratio, "durable", nbytes=bench.nbytes)
    chosen = f"{best} had the best median of the {len(limits)} best in the screening"
    bar = Bar(">=", 0.95)
    add_ratio(f"ckpt / best of {'fio' if by_fio else 'own loop'}", ours, samples[best], how=chosen, bar=bar)
    if by_fio:
        huge = samples[f"{limits[0]}{HUGE}"]
        add_ratio("ckpt / fio, both in huge pages", samples[f"ckpt{HUGE}"], huge, how="rates of both")
        add_ratio("ckpt / fio in huge pages", ours, huge, how="rates of both; only fio's memory is in huge pages")
    add_ratio("ckpt / torch.save + fsync", ours, samples["torch.save + fsync"], how="rates of both")


def how_measured(name: str) -> str:
    for start, how in (("ckpt", HOW_CKPT), ("torch", HOW_TORCH), ("fio", HOW_FIO)):
        if name.startswith(start):
            return how
    return HOW_LOOP


# ---- sweep -----------------------------------------------------------------------------------------------------------


def measure_sweep(settings: Settings, report: Report) -> None:
    """Writer threads x chunk sizes; and the defaults without preallocation, where the build can leave it out."""
    with settings.workspace() as directory:
        bench = Bench(settings, directory)
        sides = []
        for writers in settings.writers:
            for chunk in settings.chunk_bytes:
                options = ckpt.Options(writers=writers, chunk_bytes=chunk, arena_bytes="128MiB")
                name = f"{writers} writers x {chunk / MIB:g} MiB"
                sides.append(Side(name, partial(bench.ckpt_rate, options)))
        if hasattr(_native, "set_fault"):
            sides.append(Side("defaults, no fallocate", partial(rate_without_fallocate, bench)))
        sides.append(Side("defaults", partial(bench.ckpt_rate, dataclasses.replace(ckpt.Options(), arena_bytes="128MiB"))))
        samples = interleave(sides, settings.rounds_or(5), settings.settle)
    for name, column in samples.items():
        report.add("sweep", name, "GB/s", column, nbytes=bench.nbytes, how=HOW_CKPT)


def rate_without_fallocate(bench: Bench) -> Values:
    """As on a file system that has none: the file is only given its length."""
    _native.set_fault("fallocate", error=errno.EOPNOTSUPP)
    try:
        return bench.ckpt_rate(dataclasses.replace(ckpt.Options(), arena_bytes="128MiB"))
    finally:
        _native.clear_faults()
