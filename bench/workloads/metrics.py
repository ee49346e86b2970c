"""What metrics and events cost a save: of the same state, in the same run, in turn."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import ckpt
from bench.measure.report import Report
from bench.measure.sampling import GIB, Settings, Side, Values, clock, column, interleave
from bench.workloads.training import Trainer, bytes_of
from ckpt.metrics import callback, textfile

WATCHED_BYTES = GIB // 16  # so small that what is kept of a save is not lost in what its bytes take
ROUNDS = 24
KEEP = 2
HOW = (
    "on: events.jsonl, a callback, and a text file for node_exporter; off: none of these, but the counts in memory. noted_s: "
    "from durable until the outcome is told, in which all of it is noted"
)


class Job:
    """A small trainer, and two Checkpointers that save it in turn."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._trainer = Trainer(settings.sized(WATCHED_BYTES))
        self.nbytes = bytes_of(self._trainer.state())
        sinks = [callback(lambda figures: None), textfile(directory / "ckpt.prom")]
        self._step = 0
        self.watched = ckpt.Checkpointer(directory / "watched", keep=KEEP, metrics=sinks)
        self.quiet = ckpt.Checkpointer(directory / "quiet", keep=KEEP, options=ckpt.Options(events=False))

    def measure(self, checkpointer: ckpt.Checkpointer) -> Values:
        state = self._trainer.state()
        started = clock()
        pending = checkpointer.save(self._step, state)
        save_s = clock() - started
        told: list[float] = []
        pending.add_done_callback(lambda _: told.append(time.monotonic()))
        self._step += 1
        self._trainer.forward_backward()
        fence_s = self._trainer.step()
        pending.result()
        checkpointer.wait()  # the callback has been called
        stats = pending.stats
        noted_s = told[0] - (stats.durable_at or 0.0)
        return {"blocked_s": save_s + fence_s, "save_s": save_s, "durable_s": stats.durable_s or 0.0, "noted_s": noted_s}


def measure_metrics(settings: Settings, report: Report) -> None:
    with settings.workspace() as directory:
        job = Job(settings, directory)
        sides = [Side("on", partial(job.measure, job.watched)), Side("off", partial(job.measure, job.quiet))]
        on, off = interleave(sides, settings.rounds_or(ROUNDS), settings.settle, warmup=2).values()
        for checkpointer in (job.watched, job.quiet):
            checkpointer.close()
    for name in ("blocked_s", "save_s", "durable_s", "noted_s"):
        for side, samples in (("on", on), ("off", off)):
            report.add("metrics", side, "s", column(samples, name), nbytes=job.nbytes, how=f"{name}. {HOW}")
    for name in ("blocked_s", "durable_s"):
        above, below = column(on, name), column(off, name)
        report.add_ratio("metrics", f"on / off, {name}", above, below, nbytes=job.nbytes, how=f"{name}. {HOW}")
