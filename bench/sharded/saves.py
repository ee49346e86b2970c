"""What a save of a sharded state costs the ranks that make it together: blocked time, and time until it is durable."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.measure.ranks import Ranks
from bench.measure.sampling import Settings, Side, Values, clock, interleave
from bench.rivals.base import Rival
from bench.rivals.registry import said
from bench.rivals.sharded import CkptSharded, chosen
from bench.sharded.plan import Plan
from bench.sharded.state import Shape, Training, blank_like, difference, local_tensors

KEEP = 1  # checkpoints, besides the one that is being written
# What stands for forward and backward is longer than the flush of each side: by so much, as far as its second save has told.
FLUSHES_PER_ITERATION = 1.25


class Job:
    """Ours and its rivals, on one training. All ranks make the same calls."""

    def __init__(self, plan: Plan, ranks: Ranks, settings: Settings) -> None:
        self._plan, self._ranks, self._settings = plan, ranks, settings
        self.shape = Shape.of(plan.tensors, plan.nbytes)
        self.training = Training(self.shape, ranks)
        self.errors: dict[str, str] = {}
        self.rivals: dict[str, Rival] = {}
        self.compute_s = 0.0
        self._flushes_s: list[float] = []
        for number, kind in enumerate(chosen(plan.rivals)):
            self._try_out(kind(Path(plan.directory) / f"rival{number}", KEEP))

    def _try_out(self, rival: Rival) -> None:
        """It saves, is stepped, and loads what was there at the save. One that cannot do that on all ranks is not measured.

        Raises:
            RuntimeError: it is ours.
        """
        error = ""
        try:
            rival.open()
            error = self._check(rival)
        except BaseException as caught:  # torch raises what is no Exception
            error = said(caught)
        errors = [each for each in self._ranks.gather(error) if each]
        if not errors:
            self.rivals[rival.name] = rival
        elif rival.ours:
            raise RuntimeError(f"{rival.name}: {errors[0]}")
        else:
            self.errors[rival.name] = errors[0]

    def _check(self, rival: Rival) -> str:
        self.iterate(rival)  # the first one touches fresh memory, and makes directories
        expected = {name: tensor.clone() for name, tensor in local_tensors(self.training.state).items()}
        self._flushes_s.append(self.iterate(rival)["durable_s"])
        into = blank_like(self.training.state)
        rival.load(into)
        self._prune(rival)
        return difference(expected, into)

    def choose_compute(self) -> None:
        """So that it is longer than a flush of any side on any rank."""
        longest = max(max(each) for each in self._ranks.gather(self._flushes_s))
        self.compute_s = self._plan.compute_s or max(self._plan.least_compute_s, FLUSHES_PER_ITERATION * longest)

    def iterate(self, rival: Rival) -> Values:
        """One save with compute and a step behind it, on this rank's own clock, until it is durable on all."""
        self._ranks.meet()
        started = clock()
        rival.save(self.training.state)
        saved = clock()
        time.sleep(self.compute_s)
        reached = clock()
        rival.before_step()
        fenced = self.training.step()
        rival.finish()
        values = {"blocked_s": saved - started + fenced - reached, "save_s": saved - started, "fence_s": fenced - reached}
        return values | {"durable_s": rival.durable_at - started}

    def side(self, rival: Rival) -> Side:
        def measure() -> Values:
            before = rival.sent_bytes if isinstance(rival, CkptSharded) else 0
            each = self._ranks.gather(self.iterate(rival))
            values = {name: max(values[name] for values in each) for name in each[0]}
            values |= {f"rank0_{name}": value for name, value in each[0].items()}
            if isinstance(rival, CkptSharded):
                sent = self._ranks.gather(rival.sent_bytes - before)
                values["sent_bytes"] = float(max(sent[1:], default=0))
                values["at_fence_bytes"] = float(max(self._ranks.gather(rival.stats.bytes_copied_at_fence)))
            self._prune(rival)
            return values

        return Side(rival.name, measure)

    def _prune(self, rival: Rival) -> None:
        if self._ranks.rank == 0:
            rival.prune()

    def settle(self) -> None:
        self._settings.settle()
        self._ranks.meet()

    def close(self) -> None:
        for rival in self.rivals.values():
            rival.close()


def measure_saves(plan: Plan, ranks: Ranks, settings: Settings) -> dict[str, Any]:
    job = Job(plan, ranks, settings)
    job.choose_compute()
    sides = [job.side(rival) for rival in job.rivals.values()]
    samples = interleave(sides, plan.rounds, job.settle)
    job.close()
    rows = {
        side: [{"started_s": each.started_s, "values": each.values} for each in measured] for side, measured in samples.items()
    }
    return {
        "samples": rows,
        "errors": job.errors,
        "configurations": {name: rival.configuration for name, rival in job.rivals.items()},
        "compute_s": job.compute_s,
        "tensors": job.shape.tensors,
        "nbytes": job.shape.nbytes,
    }
