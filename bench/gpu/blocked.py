"""How long a save of a GPU's state holds training up, and what else it takes: each way of saving the same job, in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.device import Watch
from bench.gpu.rivals import DCP_ASYNC, NOTHING, CkptFile, Nothing, group_of_one, make_rivals
from bench.gpu.setup import OURS, Bench, check_file, medians_of, tensors_of, used
from bench.measure.report import Bar, Report
from bench.measure.sampling import MIB, Sample, Samples, Side, Values, clock, column, interleave, note
from bench.rivals.base import Rival

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
    """A rival, and what became of it. One that is not ours may fail, and is then left out."""

    def __init__(self, bench: Bench, rival: Rival) -> None:
        self.rival, self.error = rival, ""
        self.memory: Values = {}
        self.first_save_s: float | None = None  # the call, with whatever is made in it
        self._bench = bench

    def measure(self) -> Values:
        return self._guarded(self._iterate)

    def first_time(self) -> None:
        """A save that does not count; its memory and its content are looked at."""
        self._guarded(self._look)

    def close(self) -> None:
        """What has been measured stays, whatever becomes of it now."""
        try:
            self.rival.close()
        except Exception as error:
            print(f"{self.rival.name} could not be closed: {error}", file=sys.stderr)

    def _guarded(self, measure: Callable[[], Values]) -> Values:
        if self.error:
            return {}
        try:
            return measure()
        except (Exception, SystemExit) as error:  # an engine may end the program where it should raise
            if self.rival.ours:
                raise
            self.error = f"{type(error).__name__}: {error}"
            note("")
            print(f"{self.rival.name} cannot run here: {self.error}", file=sys.stderr)
            return {}

    def _look(self) -> Values:
        self.rival.open()
        watch = Watch(self._bench.device)
        with watch:
            self.first_save_s = self._iterate()["save_s"]
        self.memory = {"host_peak_MiB": watch.host_bytes / MIB, "device_peak_MiB": watch.device_bytes / MIB}
        if self.rival.one_file:
            self._iterate(check=True)
        return self.memory

    def _iterate(self, check: bool = False) -> Values:
        try:
            return self._save_and_step(check)
        finally:
            self.rival.prune()

    def _save_and_step(self, check: bool) -> Values:
        """One iteration that saves at its beginning."""
        trainer, device = self._bench.trainer, self._bench.device
        state = trainer.state()
        expected = [tensor.clone() for tensor in tensors_of(state)] if check else []
        device.synchronize()
        started = clock()
        self.rival.save(state)
        save_s = clock() - started
        computing = clock()
        trainer.forward_backward()
        device.synchronize()
        forward_backward_s = clock() - computing
        held = trainer.step(self.rival.before_step)
        device.synchronize()
        iteration_s = clock() - started
        self.rival.finish()
        durable_s = self.rival.durable_at - started
        if check:
            check_file(self.rival.newest, expected, device)
        held_s = save_s + device.seconds_between(held.began, held.ended)
        values = {"blocked_s": save_s + held.host_s, "save_s": save_s, "fence_s": held.host_s, "held_s": held_s}
        return values | {"iteration_s": iteration_s, "durable_s": durable_s, "forward_backward_s": forward_backward_s}


def measure_blocked(bench: Bench, directory: Path, report: Report) -> None:
    """How long a save holds training up, and what else it takes: each way of saving the same job, in turn."""
    settings, trainer = bench.settings, bench.trainer
    trainer.lengthen(COPIES_PER_ITERATION * bench.copy_s if settings.iteration_s is None else settings.iteration_s)
    rivals = [
        *bench.ours(directory),
        Nothing(directory / "nothing", keep=0),
        *(rival for rival in make_rivals(bench.device, bench.nbytes, directory) if bench.chosen(rival.name)),
    ]
    contenders = [Contender(bench, rival) for rival in rivals]
    with group_of_one():
        for contender in contenders:
            settings.settle()
            note(f"first save: {contender.rival.name}")
            contender.first_time()
        running = [contender for contender in contenders if not contender.error]
        sides = [Side(contender.rival.name, contender.measure) for contender in running]
        samples = interleave(sides, settings.rounds_or(3), settings.settle, warmup=0)
        for contender in contenders:
            contender.close()
    add_blocked(bench, report, contenders, samples)


def add_blocked(bench: Bench, report: Report, contenders: Sequence[Contender], samples: Samples) -> None:
    add, add_ratio = bench.adder(report), bench.ratio_adder(report)
    for contender in contenders:
        name = contender.rival.name
        if contender.error:
            sample = Sample(samples[OURS][0].started_s, {"runs_here": 0.0})
            add(name, "1", [sample], how=f"not measured: {contender.error}", error=contender.error)
            continue
        add_times(bench, report, name, contender, samples[name])
        for quantity, megabytes in contender.memory.items():
            add(name, "MiB", [Sample(samples[name][0].started_s, {quantity: megabytes})], how=HOW_MEMORY)
    for contender in contenders:
        name = contender.rival.name
        if contender.rival.ours or contender.error:
            continue
        for quantity in ("iteration_s",) if name == NOTHING else ("blocked_s", "held_s", "durable_s"):
            pair = column(samples[OURS], quantity), column(samples[name], quantity)
            bar = BLOCKED_BAR if name.startswith(DCP_ASYNC) and quantity == "blocked_s" else None
            add_ratio(f"ckpt / {name}, {quantity[:-2]}", *pair, how=f"{quantity} of both", bar=bar)


def add_times(bench: Bench, report: Report, case: str, contender: Contender, found: Sequence[Sample]) -> None:
    rival = contender.rival
    detail: dict[str, Any] = {"saved_by": rival.configuration, "micro_steps": bench.trainer.micro_steps}
    if contender.first_save_s is not None:
        detail["first_save_s"] = contender.first_save_s
    if isinstance(rival, CkptFile):
        detail |= {"stats_medians": medians_of(rival.stats[-len(found) :]), **used(rival)}
    for quantity in OF_NOTHING if rival.name == NOTHING else HOW:
        bar = HOST_BAR if (case, quantity) == (OURS, "blocked_s") else None
        more = detail if quantity == "blocked_s" else {}
        bench.adder(report)(case, "s", column(found, quantity), how=HOW[quantity], bar=bar, **more)


def measure_early(bench: Bench, directory: Path, report: Report) -> None:
    """The same with the shortest forward + backward that there is: the fence comes while most copies are still to be made."""
    bench.trainer.micro_steps = 1
    contenders = [Contender(bench, rival) for rival in bench.ours(directory)]
    sides = [Side(contender.rival.name, contender.measure) for contender in contenders]
    samples = interleave(sides, bench.settings.rounds_or(3), bench.settings.settle)
    for contender in contenders:
        name = contender.rival.name
        add_times(bench, report, f"{name}, early fence", contender, samples[name])
