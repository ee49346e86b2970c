"""Measures the checkpoint engines of DeepSpeed: forks the ranks of a job, and of one more for each engine's memory.

python -m bench.deepspeed_engines.measure plan.json         # the fields of Plan; the results are written where it says
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import json
import math
import os
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from deepspeed import comm

from bench.deepspeed_engines.job import (
    FLOOR,
    NO_SAVING,
    OURS,
    Job,
    agree,
    jobs,
    prune,
    sides,
    slowest,
    start_distributed,
)
from bench.measure.sampling import Side, Values, clock, in_order, note

RANKS = 2
FLUSHES_PER_ITERATION = 2.0
WATCH_EVERY_S = 0.03
LONG_TOKENS, SHORT_TOKENS = 64, 8  # of a forward pass, in the two settings
MEMORY_SAVES = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        directory, results: where checkpoints and JSON go.
        state_bytes: what one checkpoint holds, the files of all ranks together.
        rivals: parts of the names of those to measure; empty: all.
        rest_s: rest before each sample, seconds.
        iteration_s: forward + backward of the compute-bound setting takes at least so long.
        alone_rounds, rounds: samples of each engine: saves by themselves, blocks of iterations.
        watched: the engines whose memory is looked at; empty: all that run.
        compute_length, flush_length: iterations of a block in either setting.
    """

    directory: str
    results: str
    state_bytes: int
    rivals: list[str]
    rest_s: float
    iteration_s: float
    alone_rounds: int
    rounds: int
    watched: list[str]
    compute_length: int
    flush_length: int


# ---- the ranks -------------------------------------------------------------------------------------------------------


class Measurement:
    """What each rank does: the same calls in the same order."""

    def __init__(self, plan: Plan, found: dict[str, Job]) -> None:
        self.plan = plan
        self.jobs = found
        self.errors: dict[str, str] = {}
        self.right: dict[str, bool] = {}
        self.saved: list[Any] = []  # the PendingSave of each of our own
        self._tags = 0
        if OURS in found:
            found[OURS].use(OURS)
            self._keep_what_is_pending(found[OURS].engine.checkpoint_engine)

    def _keep_what_is_pending(self, ours: Any) -> None:
        stock = ours.end_save

        def end_save(*arguments: Any) -> Any:
            pending = stock(*arguments)
            if pending is not None:
                self.saved.append(pending)
            return pending

        ours.end_save = end_save

    def directory(self, side: str) -> Path:
        return Path(self.plan.directory) / side.replace(" ", "-").replace(",", "")

    def tag(self) -> str:
        self._tags += 1
        return f"tag{self._tags}"

    def settle(self, side: str) -> None:
        """All but the newest checkpoints go, and the disk finishes what was asked of it before."""
        prune(self.directory(side))
        if comm.get_rank() == 0:
            os.sync()
            time.sleep(self.plan.rest_s)
        comm.barrier()

    def try_out(self) -> None:
        """Each saves, trains on and is checked; those that fail are left out from now on."""
        for job in {id(job): job for job in self.jobs.values()}.values():
            job.iterate()
        for side, job in list(self.jobs.items()):
            if side in (NO_SAVING, FLOOR):
                continue
            job.use(side)
            error = ""
            try:
                self.right[side] = self._comes_back(side, job)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
            if error := agree(error):
                self.errors[side] = error
                del self.jobs[side]

    def _comes_back(self, side: str, job: Job) -> bool:
        expected, tag = job.weights(), self.tag()
        job.save(self.directory(side), tag)
        job.iterate()
        job.make_durable(side, self.directory(side), tag)
        wrong = 0.0 if job.is_right(self.directory(side), tag, expected) else 1.0
        return slowest({"wrong": wrong})["wrong"] == 0

    def alone(self, side: str) -> Values:
        """A save with nothing but waiting behind it."""
        job, tag = self.jobs[side], self.tag()
        job.use(side)
        self.settle(side)
        started = clock()
        values = {"call_s": job.save(self.directory(side), tag)}
        if side != FLOOR:
            job.make_durable(side, self.directory(side), tag)
            values["durable_s"] = clock() - started
        return slowest(values)

    def block(self, length: int, side: str) -> dict[str, Any]:
        """Iterations that begin with their saves, until the last save is durable; before them one that saves nothing."""
        job, saves = self.jobs[side], side != NO_SAVING
        job.use(side)
        self.settle(side)
        job.iterate()
        comm.barrier()
        iterations, tag, begun = [], "", clock()
        for _ in range(length):
            started = clock()
            save_s = job.save(self.directory(side), tag := self.tag()) if saves else 0.0
            iterations.append((started, self._iteration(job, save_s)))
        trained_s = clock() - begun
        if saves:
            job.make_durable(side, self.directory(side), tag)
        total = slowest({"total_s": clock() - begun, "trained_s": trained_s})
        rows = [{"started_s": started, "values": slowest(values)} for started, values in iterations]
        return {"started_s": begun, "values": total, "iterations": rows}

    def _iteration(self, job: Job, save_s: float) -> Values:
        values = job.iterate()
        values["forward_backward_s"] = values["iteration_s"] - values["step_s"]
        return {
            "blocked_s": save_s + values["held_s"],
            "save_and_step_s": save_s + values["step_s"],
            "save_s": save_s,
        } | values

    def rounds(self, what: str, rounds: int, names: list[str], measure: Callable[[str], Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in names}
        order = [Side(name, lambda: {}) for name in names]
        for number in range(rounds):
            for side in in_order(order, number):
                if comm.get_rank() == 0:
                    note(f"deepspeed: {what}, round {number + 1}/{rounds}: {side.name}")
                found[side.name].append(measure(side.name))
        return found

    def saves_alone(self) -> dict[str, list[Any]]:
        def measure(side: str) -> dict[str, Any]:
            started = clock()
            return {"started_s": started, "values": self.alone(side)}

        names = [side for side in self.jobs if side != NO_SAVING]
        return self.rounds("saves alone", self.plan.alone_rounds, names, measure)

    def setting(self, what: str, length: int) -> dict[str, Any]:
        self.saved.clear()
        names = [side for side in self.jobs if side != FLOOR]
        found = self.rounds(what, self.plan.rounds, names, lambda side: self.block(length, side))
        return {"blocks": found, "micro_steps": self.jobs[NO_SAVING].micro_steps, "length": length, "stats": self.stats()}

    def stats(self) -> dict[str, float]:
        """Medians over our own saves, of the rank that has the largest."""
        if not self.saved:
            return {}
        rows = []
        for pending in self.saved:
            row = dataclasses.asdict(pending.stats)
            row["flush_s"] = (row["durable_at"] or math.nan) - (row["started_at"] or math.nan)
            rows.append({name: float(value) for name, value in row.items() if not name.endswith("_at")})
        return slowest({name: statistics.median(row[name] for row in rows) for name in rows[0]})

    def lengthen(self, flush_s: float) -> None:
        """Chooses the micro-steps of an iteration so that forward + backward takes well longer than a flush."""
        self._shape(LONG_TOKENS, 1)
        job = self.jobs[NO_SAVING]
        job.use(NO_SAVING)
        job.iterate()
        self._shape(LONG_TOKENS, 2)  # the second pass also communicates, the first does not
        values = [slowest(self._iteration(job, 0.0)) for _ in range(2)]
        pass_s = min(value["forward_backward_s"] for value in values) / 2
        wanted_s = max(FLUSHES_PER_ITERATION * flush_s, self.plan.iteration_s)
        self._shape(LONG_TOKENS, max(1, math.ceil(wanted_s / pass_s)))

    def _shape(self, tokens: int, micro_steps: int) -> None:
        for job in self.jobs.values():
            job.choose(tokens, micro_steps)

    def all(self) -> dict[str, Any]:
        self._shape(SHORT_TOKENS, 1)
        self.try_out()
        alone = self.saves_alone()
        flush_s = statistics.median(sample["values"]["durable_s"] for sample in alone[OURS])
        self.lengthen(flush_s)
        compute = self.setting("compute-bound", self.plan.compute_length)
        self._shape(SHORT_TOKENS, 1)
        flush = self.setting("flush-bound", self.plan.flush_length)
        return {"alone": alone, "compute-bound": compute, "flush-bound": flush, "flush_s": flush_s, "right": self.right}


def measure(plan: Plan) -> None:
    with jobs(plan.state_bytes, sides(plan.rivals)) as (found, errors):
        measurement = Measurement(plan, found)
        results = measurement.all()
        results |= {"errors": errors | measurement.errors, "nbytes": found[NO_SAVING].nbytes}
        if comm.get_rank() == 0:
            Path(plan.results).write_text(json.dumps(results), encoding="utf-8")


def save_watched(plan: Plan, side: str, begin: Path, end: Path) -> None:
    """Short iterations with a save each, between the two files."""
    with jobs(plan.state_bytes, [side]) as (found, _):
        measurement = Measurement(plan, found)
        job = found[side]
        job.use(side)
        job.choose(SHORT_TOKENS, 1)
        for _ in range(2):
            job.iterate()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        comm.barrier()
        begin.touch()
        for _ in range(MEMORY_SAVES):
            if side != NO_SAVING:
                job.save(measurement.directory(side), tag := measurement.tag())
            job.iterate()
        if side != NO_SAVING:
            job.make_durable(side, measurement.directory(side), tag)
        comm.barrier()
        end.touch()


# ---- the program that forks them -------------------------------------------------------------------------------------


def fork(work: Callable[[], None]) -> list[int]:
    """Starts the ranks of a job; they import nothing again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"CROSS_RANK": 0, "CROSS_SIZE": 1}  # as DeepSpeed's launcher has it
    pids = []
    for rank in range(RANKS):
        if (pid := os.fork()) == 0:
            os.environ.update({name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()})
            run_rank(work)
        pids.append(pid)
    return pids


def run_rank(work: Callable[[], None]) -> None:
    status = 1
    try:
        start_distributed()
        work()
        comm.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def join(pids: list[int], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits for the ranks. If one fails, the others end with it.

    Raises:
        RuntimeError: one has failed.
    """
    left = list(pids)
    try:
        while left:
            meanwhile()
            for pid in list(left):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    left.remove(pid)
                    if status != 0:
                        raise RuntimeError(f"a rank has ended with status {status}")
            time.sleep(WATCH_EVERY_S)
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Watch:
    """The largest sum of the proportional set sizes of all processes of a job, between its two marks."""

    def __init__(self, pids: list[int], begin: Path, end: Path) -> None:
        self._ranks = [psutil.Process(pid) for pid in pids]
        self._begin, self._end = begin, end
        self.peak = self.children_at_peak = 0

    def look(self) -> None:
        if not self._begin.exists() or self._end.exists():
            return
        try:
            own = sum(rank.memory_full_info().pss for rank in self._ranks)
            children = sum(child.memory_full_info().pss for rank in self._ranks for child in rank.children(recursive=True))
        except psutil.NoSuchProcess:
            return
        if own + children > self.peak:
            self.peak, self.children_at_peak = own + children, children


def memory_of(plan: Plan, side: str) -> Values:
    place = Path(plan.directory)
    begin, end = place / "begin", place / "end"
    for mark in (begin, end):
        mark.unlink(missing_ok=True)
    pids = fork(lambda: save_watched(plan, side, begin, end))
    watch = Watch(pids, begin, end)
    join(pids, watch.look)
    return {"peak_bytes": watch.peak, "children_bytes": watch.children_at_peak}


def main(plan: Plan) -> None:
    importlib.import_module("torch._dynamo")  # every rank needs it in its first step; imported once, before they are forked
    join(fork(lambda: measure(plan)))
    results = json.loads(Path(plan.results).read_text(encoding="utf-8"))
    results["memory"] = {}
    for side in results["compute-bound"]["blocks"]:
        if not plan.watched or side in plan.watched:
            note(f"deepspeed: memory: {side}")
            started = clock()
            results["memory"][side] = [{"started_s": started, "values": memory_of(plan, side)}]
    Path(plan.results).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Plan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
