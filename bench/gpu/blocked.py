"""How long a save of a GPU's state holds training up, and what else it takes: each way of saving the same job, in turn."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.device import Watch
from bench.gpu.rivals import DCP_ASYNC, NOTHING, Ckpt, Nothing, Saver, group_of_one, make_rivals
from bench.gpu.setup import OURS, Bench, check_file, medians_of, tensors_of, used
from bench.measure.report import Bar, Report
from bench.measure.sampling import MIB, Sample, Samples, Side, Values, clock, column, interleave, note

COPIES_PER_ITERATION = 2.0  # forward + backward takes so many times what the copies take
HOST_BAR, BLOCKED_BAR = Bar("<=", 0.005), Bar("<=", 1 / 20)

HOW = {
    "blocked_s": "host time: clock around the call that saves, plus fence_s; the device is synchronised before the first clock "
    "and, after forward + backward, before the second",
    "save_s": "clock around the call that saves; the device is idle before",
    "fence_s": "clock from where the step begins to the end of its global pre-step hooks (the automatic fence), with what must "
    "be waited for before (stagers of others); the device has been synchronised before",
    "held_s": "save_s, plus the time between two events of the idle device around fence_s: what the device waits for is in it",
    "iteration_s": "clock from the call that saves until the device has done forward, backward and step; copies and writes go "
    "on beside them",
    "durable_s": "clock from the call that saves until its checkpoint is durable, with forward, backward and step behind it",
    "forward_backward_s": "clock around forward + backward, until the device has done it",
}
OF_NOTHING = ("blocked_s", "iteration_s", "forward_backward_s")
HOW_MEMORY = (
    "looked at every 10 ms during the first save of this side, over what was taken just before it; engine, arena and staging "
    "memory are made in it, but for what it shares with a side before: the small arena with a device cache is that without"
)


class Contender:
    """A saver, and what became of it. One that is not ours may fail, and is then left out."""

    def __init__(self, bench: Bench, saver: Saver, directory: Path) -> None:
        self.saver, self.error = saver, ""
        self.memory: Values = {}
        self.first_save_s: float | None = None  # the call, with whatever is made in it
        self._bench, self._directory = bench, directory

    def measure(self) -> Values:
        return self._guarded(self._iterate)

    def first_time(self) -> None:
        """A save that does not count; its memory and its content are looked at."""
        self._guarded(self._look)

    def close(self) -> None:
        """What has been measured stays, whatever becomes of it now."""
        try:
            self.saver.close()
        except Exception as error:
            print(f"{self.saver.name} could not be closed: {error}", file=sys.stderr)

    def _guarded(self, measure: Callable[[], Values]) -> Values:
        if self.error:
            return {}
        try:
            return measure()
        except (Exception, SystemExit) as error:  # an engine may end the program where it should raise
            if self.saver.ours:
                raise
            self.error = f"{type(error).__name__}: {error}"
            note("")
            print(f"{self.saver.name} cannot run here: {self.error}", file=sys.stderr)
            return {}

    def _look(self) -> Values:
        watch = Watch(self._bench.device)
        with watch:
            self.first_save_s = self._iterate()["save_s"]
        self.memory = {"host_peak_MiB": watch.host_bytes / MIB, "device_peak_MiB": watch.device_bytes / MIB}
        if self.saver.one_file:
            self._iterate(check=True)
        return self.memory

    def _iterate(self, check: bool = False) -> Values:
        path = self._bench.path(self._directory)
        try:
            return self._save_and_step(path, check)
        finally:
            remove(path)

    def _save_and_step(self, path: Path, check: bool) -> Values:
        """One iteration that saves at its beginning."""
        trainer, device = self._bench.trainer, self._bench.device
        state = trainer.state()
        expected = [tensor.clone() for tensor in tensors_of(state)] if check else []
        device.synchronize()
        started = clock()
        self.saver.begin(state, path)
        save_s = clock() - started
        computing = clock()
        trainer.forward_backward()
        device.synchronize()
        forward_backward_s = clock() - computing
        held = trainer.step(self.saver.before_step)
        device.synchronize()
        iteration_s = clock() - started
        durable_s = self.saver.finish() - started
        if check:
            check_file(path, expected, device)
        held_s = save_s + device.seconds_between(held.began, held.ended)
        values = {"blocked_s": save_s + held.host_s, "save_s": save_s, "fence_s": held.host_s, "held_s": held_s}
        return values | {"iteration_s": iteration_s, "durable_s": durable_s, "forward_backward_s": forward_backward_s}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # one that failed may still be writing
    else:
        path.unlink(missing_ok=True)


def measure_blocked(bench: Bench, directory: Path, report: Report) -> None:
    """How long a save holds training up, and what else it takes: each way of saving the same job, in turn."""
    settings, trainer = bench.settings, bench.trainer
    trainer.lengthen(COPIES_PER_ITERATION * bench.copy_s if settings.iteration_s is None else settings.iteration_s)
    savers = [
        *bench.savers(),
        Nothing(),
        *(rival for rival in make_rivals(bench.device, bench.nbytes) if bench.chosen(rival.name)),
    ]
    contenders = [Contender(bench, saver, directory) for saver in savers]
    with group_of_one():
        for contender in contenders:
            settings.settle()
            note(f"first save: {contender.saver.name}")
            contender.first_time()
        running = [contender for contender in contenders if not contender.error]
        sides = [Side(contender.saver.name, contender.measure) for contender in running]
        samples = interleave(sides, settings.rounds_or(3), settings.settle, warmup=0)
        for contender in contenders:
            contender.close()
    add_blocked(bench, report, contenders, samples)


def add_blocked(bench: Bench, report: Report, contenders: Sequence[Contender], samples: Samples) -> None:
    add, add_ratio = bench.adder(report), bench.ratio_adder(report)
    for contender in contenders:
        name = contender.saver.name
        if contender.error:
            sample = Sample(samples[OURS][0].started_s, {"runs_here": 0.0})
            add(name, "1", [sample], how=f"not measured: {contender.error}", error=contender.error)
            continue
        add_times(bench, report, name, contender, samples[name])
        for quantity, megabytes in contender.memory.items():
            add(name, "MiB", [Sample(samples[name][0].started_s, {quantity: megabytes})], how=HOW_MEMORY)
    for contender in contenders:
        name = contender.saver.name
        if contender.saver.ours or contender.error:
            continue
        for quantity in ("iteration_s",) if name == NOTHING else ("blocked_s", "held_s", "durable_s"):
            pair = column(samples[OURS], quantity), column(samples[name], quantity)
            bar = BLOCKED_BAR if name.startswith(DCP_ASYNC) and quantity == "blocked_s" else None
            add_ratio(f"ckpt / {name}, {quantity[:-2]}", *pair, how=f"{quantity} of both", bar=bar)


def add_times(bench: Bench, report: Report, case: str, contender: Contender, found: Sequence[Sample]) -> None:
    saver = contender.saver
    detail: dict[str, Any] = {"saved_by": saver.how, "micro_steps": bench.trainer.micro_steps}
    if contender.first_save_s is not None:
        detail["first_save_s"] = contender.first_save_s
    if isinstance(saver, Ckpt):
        detail |= {"stats_medians": medians_of(saver.stats[-len(found) :]), **used(saver)}
    for quantity in OF_NOTHING if saver.name == NOTHING else HOW:
        bar = HOST_BAR if (case, quantity) == (OURS, "blocked_s") else None
        more = detail if quantity == "blocked_s" else {}
        bench.adder(report)(case, "s", column(found, quantity), how=HOW[quantity], bar=bar, **more)


def measure_early(bench: Bench, directory: Path, report: Report) -> None:
    """The same with the shortest forward + backward that there is: the fence comes while most copies are still to be made."""
    bench.trainer.micro_steps = 1
    contenders = [Contender(bench, saver, directory) for saver in bench.savers()]
    sides = [Side(contender.saver.name, contender.measure) for contender in contenders]
    samples = interleave(sides, bench.settings.rounds_or(3), bench.settings.settle)
    for contender in contenders:
        name = contender.saver.name
        add_times(bench, report, f"{name}, early fence", contender, samples[name])
