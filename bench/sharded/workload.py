"""Saves and loads of a sharded state beside torch.distributed.checkpoint, and what planning costs one of very many ranks."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure.ranks import environment_of_ranks, run_job, torchrun
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, Sample, Settings, column, note
from bench.rivals.sharded import DROP_IN, KEPT, OURS, SAVE, THREAD
from bench.sharded.plan import LOADS, PLANNING, SAVES, Plan

RANKS, MORE_RANKS = 2, 4
TENSORS, SMALL_TENSORS, FEWEST_TENSORS = 500, 10_000, 40
SMALL_BYTES = 3072 + 4  # of a parameter with its moments and its step
SIMULATED_RANKS, SIMULATED_TENSORS = 16_384, 1_000
PARTS = ("blocked", "restore", "planning")

LOADERS = {OURS: "ckpt, restore(sharded_into=)", DROP_IN: "ckpt, dcp.load", SAVE: "DCP load"}  # by who saved it
LARGE, SMALL = "large tensors", "small tensors"
BLOCKED_BARS = {LARGE: Bar("<=", 1 / 30), SMALL: Bar("<=", 1 / 10)}
SAVE_AND_FENCE, DURABLE = Bar("<=", 0.010), Bar("<=", 0.5)
LOAD_BARS = {RANKS: Bar("<=", 0.6), MORE_RANKS: Bar("<=", 0.8)}
PLAN_TIME, LAYOUT_BYTES = Bar("<=", 0.050), Bar("<=", 200)

SLOWEST, FIRST = "of the rank that it took longest", "of rank 0"
JOB = f"{RANKS} ranks on one machine, which meet before; each rank's own clock"
HOW = {
    "blocked_s": "clock around the call, plus clock from the end of what stands for forward and backward (a sleep) until the "
    f"pre-step hooks of optimizer.step() have run, with what must be waited for before it; {JOB}",
    "save_s": f"clock around the call; {JOB}",
    "fence_s": f"clock from the end of the sleep until the pre-step hooks of optimizer.step() have run; {JOB}",
    "durable_s": "clock from the call until this rank is told that the checkpoint is durable on all; data and metadata are "
    f"fsynced by both, directories by ours alone; {JOB}",
}
HOW_SENT = "bytes of all that the other rank has sent to rank 0 for a save whose layout is that of the one before"
HOW_LOAD = (
    "each loads, into tensors that are there, what it has saved itself: pages dropped from the page cache, the ranks meet, "
    "then each rank's own clock around the load. Once beforehand the tensors of each rank are compared with what was saved; "
    "only ours verifies checksums"
)
HOW_PLAN = (
    "clock around ShardedPlanner.plan() on one simulated rank (a fake process group knows the number of ranks); no other rank "
    "is asked, so none is there"
)
HOW_LAYOUT = "of this rank's word to rank 0 about where its parts lie, as JSON, when that is as in the save before"

Measured = dict[str, Any]


def measure_sharded(settings: Settings, report: Report) -> None:
    """
    Raises:
        RuntimeError: a job failed; the message says what it said.
        ValueError: there is no such part.
    """
    parts = settings.parts or PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"there is no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    with settings.workspace() as directory:
        jobs = Jobs(settings, directory)
        if "blocked" in parts:
            for shape in (LARGE, SMALL):
                add_saves(report, shape, jobs.saves(shape))
                report.flush()
        if "restore" in parts:
            for ranks in (RANKS, MORE_RANKS):
                add_loads(report, ranks, jobs.loads(ranks))
            report.flush()
        if "planning" in parts:
            add_planning(report, jobs.planning())


class Jobs:
    """Runs the ranks."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings, self._directory = settings, directory

    def saves(self, shape: str) -> Measured:
        settings = self._settings
        tensors = max(FEWEST_TENSORS, min(TENSORS, settings.sized(TENSORS)))
        nbytes = settings.sized(GIB)
        if shape == SMALL:
            tensors = max(FEWEST_TENSORS, settings.sized(SMALL_TENSORS))
            nbytes = tensors // 4 * SMALL_BYTES
        note(f"sharded: saves of {tensors} tensors")
        measured = self._run(SAVES, RANKS, 5, tensors=tensors, nbytes=nbytes, rivals=settings.rivals)
        shutil.rmtree(self._directory / SAVES)
        return measured

    def loads(self, ranks: int) -> Measured:
        """Those of RANKS write what all load."""
        tensors = max(FEWEST_TENSORS, min(TENSORS, self._settings.sized(TENSORS)))
        note(f"sharded: loads on {ranks} ranks")
        return self._run(LOADS, ranks, 5, tensors=tensors, nbytes=self._settings.sized(GIB), write=ranks == RANKS)

    def planning(self) -> Measured:
        sized = self._settings.sized
        note("sharded: planning")
        sizes = {"tensors": max(8, sized(SIMULATED_TENSORS)), "simulated_ranks": sized(SIMULATED_RANKS)}
        return self._run(PLANNING, 1, 20, **sizes)

    def _run(self, part: str, ranks: int, rounds: int, **more: Any) -> Measured:
        settings = self._settings
        place, results = self._directory / "plan.json", self._directory / "results.json"
        compute = {"compute_s": settings.iteration_s}
        files = {"directory": str(self._directory / part), "results": str(results)}
        plan = Plan(part, rounds=settings.rounds_or(rounds), rest_s=settings.rest_s, **files, **compute, **more)
        place.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")
        run_job([*torchrun(ranks), "-m", "bench.sharded.rank", str(place)], environment_of_ranks())
        measured: Measured = json.loads(results.read_text(encoding="utf-8"))
        results.unlink()
        return measured


# ---- lines -----------------------------------------------------------------------------------------------------------


def samples_of(measured: Measured) -> dict[str, list[Sample]]:
    return {side: [Sample(row["started_s"], row["values"]) for row in rows] for side, rows in measured["samples"].items()}


def add_saves(report: Report, shape: str, measured: Measured) -> None:
    sides = samples_of(measured)
    for name, error in measured["errors"].items():
        print(f"\n{name} cannot run here: {error}", file=sys.stderr)
        missing = Sample(sides[OURS][0].started_s, {"runs_here": 0.0})
        how = f"not measured: {error}"
        report.add("sharded", f"{shape}: {name}", "1", [missing], nbytes=measured["nbytes"], how=how, error=error)
    for side, samples in sides.items():
        add_side(report, shape, side, samples, measured)
    ratio = partial(report.add_ratio, "sharded", nbytes=measured["nbytes"])
    for side in (side for side in sides if side not in (OURS, DROP_IN)):
        for ours in (OURS, DROP_IN):
            bar = BLOCKED_BARS[shape] if side in (THREAD, KEPT) else None
            blocked = column(sides[ours], "blocked_s"), column(sides[side], "blocked_s")
            ratio(f"{shape}: {ours} / {side}, blocked", *blocked, how="blocked_s of both, of the slowest rank", bar=bar)
            bar = DURABLE if side in (THREAD, KEPT) else None
            durable = column(sides[ours], "durable_s"), column(sides[side], "durable_s")
            ratio(f"{shape}: {ours} / {side}, durable", *durable, how="durable_s of both, of the slowest rank", bar=bar)


def add_side(report: Report, shape: str, side: str, samples: list[Sample], measured: Measured) -> None:
    add = partial(report.add, "sharded", f"{shape}: {side}", nbytes=measured["nbytes"], tensors=measured["tensors"])
    longer = sum(sample.values["durable_s"] < measured["compute_s"] for sample in samples)
    detail = {
        "configuration": measured["configurations"][side],
        "compute_s": measured["compute_s"],
        "compute_longer_than_flush": f"in {longer} of {len(samples)} rounds",
    }
    for name, how in HOW.items():
        bar = SAVE_AND_FENCE if (side, shape, name) == (OURS, LARGE, "blocked_s") else None
        add("s", column(samples, name), how=f"{SLOWEST}: {how}", bar=bar, **detail)
        if name in ("blocked_s", "durable_s"):
            add("s", column(samples, f"rank0_{name}"), how=f"{FIRST}: {how}", **detail)
    if "sent_bytes" in samples[0].values:
        add("B", column(samples, "sent_bytes"), how=HOW_SENT)
        add("B", column(samples, "at_fence_bytes"), how="PendingSave.stats.bytes_copied_at_fence, of the rank that has most")


def add_loads(report: Report, ranks: int, measured: Measured) -> None:
    sides, nbytes = samples_of(measured), measured["nbytes"]
    title = f"load, {RANKS} -> {ranks} ranks"
    for side, samples in sides.items():
        add = partial(report.add, "sharded", f"{title}: {LOADERS[side]}", "s", nbytes=nbytes, tensors=measured["tensors"])
        add(samples, how=f"{SLOWEST}: {HOW_LOAD}")
        add(column(samples, "rank0_load_s"), how=f"{FIRST}: {HOW_LOAD}")
    for ours in (OURS, DROP_IN):
        how, bar = "load_s of both, of the slowest rank", LOAD_BARS[ranks]
        case = f"{title}: {LOADERS[ours]} / {LOADERS[SAVE]}"
        report.add_ratio("sharded", case, sides[ours], sides[SAVE], nbytes=nbytes, how=how, bar=bar)


def add_planning(report: Report, measured: Measured) -> None:
    ranks, tensors = measured["ranks"], measured["tensors"]
    for side, samples in samples_of(measured).items():
        first, others = samples[:1], samples[1:]
        case = f"planning, {ranks} ranks: {side}"
        items = int(statistics.median(sample.values["items"] for sample in others))
        add = partial(report.add, "sharded", nbytes=tensors, tensors=tensors, ranks=ranks, parts_written=items)
        add(case, "s", column(others, "plan_s"), how=f"{HOW_PLAN}; not the first save", bar=PLAN_TIME)
        add(f"{case}, first save", "s", column(first, "plan_s"), how=HOW_PLAN)
        add(case, "B", column(others, "layout_bytes"), how=HOW_LAYOUT, bar=LAYOUT_BYTES)
        add(f"{case}, first save", "B", column(first, "layout_bytes"), how="of the same word with the layout itself")
        add(case, "s", column(others, "layout_s"), how="clock around encoding that layout and its digest; behind the save")
