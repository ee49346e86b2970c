"""Saving from a GPU: how fast the bytes leave it, what holds training up, what a save every iteration costs, beside others."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.gpu.blocked import measure_blocked, measure_early
from bench.gpu.device import find_device
from bench.gpu.iterations import measure_iterations
from bench.gpu.restore import measure_restore
from bench.gpu.rivals import CkptFile
from bench.gpu.setup import OURS, Bench, medians_of, used
from bench.measure.report import Bar, Report
from bench.measure.sampling import Settings, Side, Values, clock, interleave, note

LIMIT = "pinned limit"
BAR = Bar(">=", 0.95)
HOW_LIMIT = (
    "bytes by the time between two events of the device around copies of as many bytes as a save has, in blocks of at most "
    "2 GiB, to one pinned block (Tensor.copy_, non_blocking)"
)
HOW_RATE = (
    "bytes fetched from the device, by the clock from the call of save() until all copies have ended (Job.wait_released); the "
    "device is idle before; the file becomes durable afterwards, outside of the clock"
)


def measure_gpu(settings: Settings, report: Report) -> None:
    """
    Raises:
        RuntimeError: there is no GPU here; or some parts failed, after all have had their turn.
        ValueError: there is no such part.
    """
    if unknown := set(settings.parts) - PARTS.keys():
        raise ValueError(f"gpu has no part {', '.join(sorted(unknown))}; it has {', '.join(PARTS)}")
    device = find_device(settings.pretended_cuda)
    if device.stand_in:
        print("\nno GPU: a stand-in plays its part; what it measures means nothing", file=sys.stderr)
    bench = Bench(settings, device)
    described, failed = {"gpu": device.describe()}, []
    for name in (name for name in PARTS if not settings.parts or name in settings.parts):
        note("")
        print(f"gpu: {name}", file=sys.stderr)
        begin = len(report.lines)
        try:
            with settings.workspace() as directory:
                PARTS[name](bench, directory, report)
        except Exception:  # the others are still worth their time
            traceback.print_exc()
            failed.append(name)
        for line in report.lines[begin:]:
            line["machine"] = line["machine"] | described
            line["job"] = bench.describe_job()
        report.flush()
    if failed:
        raise RuntimeError(f"these parts failed: {', '.join(failed)}")


def measure_rate(bench: Bench, directory: Path, report: Report) -> None:
    """How fast a save empties the device, beside a bare copy."""
    settings = bench.settings
    ours = bench.ours(directory)
    sides = [Side(rival.name, partial(save_rate, bench, rival)) for rival in ours]
    samples = interleave([*sides, Side(LIMIT, bench.pinned_rate)], settings.rounds_or(5), settings.settle)
    add, add_ratio = bench.adder(report), bench.ratio_adder(report)
    add(LIMIT, "GB/s", samples[LIMIT], how=HOW_LIMIT)
    for rival in ours:
        found, bar = samples[rival.name], BAR if rival.name == OURS else None
        add(rival.name, "GB/s", found, how=HOW_RATE, stats_medians=medians_of(rival.stats[-len(found) :]), **used(rival))
        add_ratio(f"{rival.name} / {LIMIT}", found, samples[LIMIT], how="rates of both", bar=bar)


def save_rate(bench: Bench, rival: CkptFile) -> Values:
    state = bench.trainer.state()
    bench.device.synchronize()
    started = clock()
    rival.save(state)
    rival.wait_released()
    elapsed = clock() - started
    rival.finish()
    rival.prune()
    return {"rate_GBps": rival.stats[-1].bytes_from_devices / elapsed / 1e9}


# In this order, whatever is asked for: the first part measures the memory that each engine takes when it is made.
PARTS: dict[str, Callable[[Bench, Path, Report], None]] = {
    "blocked": measure_blocked,
    "early": measure_early,
    "rate": measure_rate,
    "iterations": measure_iterations,
    "restore": measure_restore,
}
