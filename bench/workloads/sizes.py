"""How the size of a state, and the number of its tensors, change what a save costs."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import ckpt
from bench.measure.report import Report
from bench.measure.sampling import GIB, Sample, Settings, Side, Values, clock, in_order, note
from bench.rivals import registry
from bench.rivals.base import Rival
from bench.rivals.registry import FEW, OURS, Field
from bench.workloads.rivals import add_versions, configured
from bench.workloads.training import bytes_of

MB, GB = 10**6, 10**9
SIZES = (10 * MB, 100 * MB, GB, 4 * GB, 8 * GB)
TENSORS_OF_A_SIZE = 64
COUNTS = (10, 100, 1_000, 10_000, 100_000)
BYTES_OF_A_COUNT = GIB // 4
HUGE = 5 * GB  # more than 32 bits can count
FLAT, GROUPS = 3, 5_000  # of the mix; a group is four small objects, one of them a tensor
ROUNDS = 3
KEEP = 1  # checkpoints of each rival: the largest must fit the disk
PATIENCE_S = 60.0  # a rival that has taken so long at one point is not asked again there
LIMIT_S = 2400.0  # no point begins later than this
SPARE_BYTES = 3 * GIB  # of memory, for the arena, this program and the page cache
SHORTEST_PAUSE_S, FLUSHES_PER_PAUSE = 0.1, 2.0

HOW_BLOCKED = (
    "clock around the save call, plus clock around what the engine needs before the tensors may change, called after a pause "
    "of twice our flush. In the pause, in the place of forward and backward on an accelerator, this program sleeps"
)
HOW_DURABLE = (
    "clock from the save call until all is on the disk; a thread waits for the engine and then fsyncs what the engine has not; "
    "a new file or directory each time"
)


class Point(NamedTuple):
    """One state."""

    axis: str
    label: str
    nbytes: int
    tensors: int
    make: Callable[[], dict[str, Any]]


def points(settings: Settings) -> list[Point]:
    found = [of_size(settings.sized(size)) for size in SIZES]
    found += [of_count(count, settings.sized(BYTES_OF_A_COUNT)) for count in scaled_counts(settings.scale)]
    huge = settings.sized(HUGE)
    found.append(Point("shape", "one huge tensor", huge, 1, partial(equal, 1, huge)))
    mixed, groups = settings.sized(GIB), max(1, int(GROUPS * min(1.0, settings.scale)))
    flat_and_small = "a few flat buffers, thousands of small objects"
    found.append(Point("shape", flat_and_small, mixed, FLAT + groups, partial(mix, mixed, groups)))
    return found


def of_size(nbytes: int) -> Point:
    return Point("bytes", f"{nbytes / MB:g} MB", nbytes, TENSORS_OF_A_SIZE, partial(equal, TENSORS_OF_A_SIZE, nbytes))


def of_count(count: int, nbytes: int) -> Point:
    return Point("tensors", f"{count} tensors", nbytes, count, partial(equal, count, nbytes))


def scaled_counts(scale: float) -> list[int]:
    return sorted({max(COUNTS[0], int(count * min(1.0, scale))) for count in COUNTS})


def equal(tensors: int, nbytes: int) -> dict[str, Any]:
    """That many tensors of the same size, of random values, because no disk can squeeze these."""
    elements = max(1, nbytes // tensors // 4)
    pattern = torch.randn(elements)
    return {"model": {f"layer{i}": pattern + i for i in range(tensors)}}


def mix(nbytes: int, groups: int) -> dict[str, Any]:
    """As a rank of DeepSpeed's ZeRO has it: flat partitions, and beside them names, shapes, small tensors and numbers."""
    flat = equal(FLAT, nbytes)["model"]
    small = {
        f"group{i}": {"name": f"module.layer{i}.weight", "shape": [i, 7], "step": torch.tensor(float(i)), "scale": 0.5 * i}
        for i in range(groups)
    }
    return {"optimizer": flat, "param_slice_mappings": small}


class Bench:
    """One state, and the rivals that are asked to save it."""

    def __init__(self, settings: Settings, point: Point, directory: Path) -> None:
        self.settings = settings
        self.point = point
        self.state = point.make()
        self.nbytes = bytes_of(self.state)
        names, self.skipped = affordable(registry.chosen(settings.rivals, FEW), point)
        self.field: Field = registry.start(names, directory, lazy=True, keep=KEEP)
        self.pause_s = SHORTEST_PAUSE_S

    def measure(self, name: str) -> Values:
        rival = self.field.rivals[name]
        rival.prune()
        self.settings.settle()
        with ThreadPoolExecutor(1) as waiter:
            started = clock()
            rival.save(self.state)
            save_s = clock() - started
            durable = waiter.submit(wait_until_durable, rival)
            time.sleep(self.pause_s)
            before = clock()
            rival.before_step()
            ckpt.fence()
            waited_s = clock() - before
            durable_s = durable.result() - started
        return {"blocked_s": save_s + waited_s, "durable_s": durable_s, "save_s": save_s}

    def rounds(self) -> dict[str, list[Sample]]:
        """A warm-up, which also tells how long the pause has to be; then rounds, for those that are not too slow."""
        samples: dict[str, list[Sample]] = {}
        spent_s: dict[str, float] = {}
        for number in range(-1, self.settings.rounds_or(ROUNDS)):
            for side in in_order([Side(name, dict) for name in self.field.rivals], number):
                name = side.name
                if spent_s.get(name, 0.0) > PATIENCE_S and samples[name]:
                    continue
                note(f"sizes: {self.point.label}: {name}")
                started = clock()
                try:
                    values = self.measure(name)
                except Exception as error:
                    if name == OURS:
                        raise
                    self.field.drop(name, error)
                    samples.pop(name, None)
                    continue
                spent_s[name] = spent_s.get(name, 0.0) + clock() - started
                if name == OURS:
                    self.pause_s = max(SHORTEST_PAUSE_S, FLUSHES_PER_PAUSE * values["durable_s"])
                found = samples.setdefault(name, [])
                if number >= 0 or spent_s[name] > PATIENCE_S:
                    found.append(Sample(started, values))
        return {name: samples[name] for name in self.field.rivals}


def wait_until_durable(rival: Rival) -> float:
    rival.finish()
    rival.synchronise()
    return clock()


def affordable(names: list[str], point: Point) -> tuple[list[str], dict[str, str]]:
    """The rivals whose copies of the state fit the memory that is free; and why the others do not run."""
    free = psutil.virtual_memory().available
    fit, skipped = [], {}
    for name in names:
        needed = registry.all_rivals()[name].copies * point.nbytes + SPARE_BYTES
        if needed <= free:
            fit.append(name)
        else:
            skipped[name] = f"beside the state it needs {needed / GB:.1f} GB of memory, and {free / GB:.1f} GB are free"
    return fit, skipped


def impossible(settings: Settings, point: Point, directory: Path, begun: float) -> str:
    """Why a point cannot be measured here; empty if it can."""
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(directory).free
    files = (KEEP + 1) * len(registry.chosen(settings.rivals, FEW)) * point.nbytes  # they stay until the point ends
    if point.nbytes + SPARE_BYTES > memory:
        return f"the state has {point.nbytes / GB:.1f} GB, and {memory / GB:.1f} GB of memory are free"
    if files > disk:
        return f"the files need up to {files / GB:.1f} GB, and {disk / GB:.1f} GB of the disk are free"
    return f"the points before it have taken {LIMIT_S:g} s" if clock() - begun > LIMIT_S else ""


def measure_sizes(settings: Settings, report: Report) -> None:
    first, begun = len(report.lines), clock()
    for point in points(settings):
        with settings.workspace() as directory:
            if reason := impossible(settings, point, directory, begun):
                add_skipped(report, point, "all", reason)
                continue
            measure_point(settings, report, point, directory)
    add_versions(report.lines[first:])


def measure_point(settings: Settings, report: Report, point: Point, directory: Path) -> None:
    bench = Bench(settings, point, directory)
    samples = bench.rounds()
    bench.field.close()
    for name, reason in bench.skipped.items():
        add_skipped(report, point, name, reason)
    for name, error in bench.field.errors.items():
        add_skipped(report, point, name, f"it failed: {error}")
    for name, found in samples.items():
        case = f"{point.label}: {name}"
        detail = {"axis": point.axis, "point": point.label, "engine": name, "tensors": point.tensors, "pause_s": bench.pause_s}
        detail |= {"configuration": configured(name), "warm_up_counted": len(found) == 1 and settings.rounds_or(ROUNDS) > 1}
        for quantity, how in (("blocked_s", HOW_BLOCKED), ("durable_s", HOW_DURABLE)):
            values = [Sample(sample.started_s, {quantity: sample.values[quantity]}) for sample in found]
            report.add("sizes", case, "s", values, nbytes=bench.nbytes, how=how, **detail)


def add_skipped(report: Report, point: Point, name: str, reason: str) -> None:
    print(f"\nsizes, {point.label}: {name} is not measured: {reason}", file=sys.stderr)
    detail = {"axis": point.axis, "point": point.label, "engine": name, "error": reason}
    sample = Sample(clock(), {"measured": 0.0})
    report.add("sizes", f"{point.label}: {name}", "1", [sample], nbytes=point.nbytes, how=f"not measured: {reason}", **detail)
