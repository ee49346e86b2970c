"""How long a checkpoint holds up the training of a framework: ours beside the framework's own, in the same job."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from bench.measure.report import Bar, Report
from bench.measure.sampling import Sample, clock, column, note

BAR = Bar("<=", 1 / 30)
ITERATION_S = 2.5  # forward + backward takes at least so long,
FLUSHES_PER_ITERATION = 2.0  # and at least so many times what a flush takes
MOST_SEQUENCES = 4096
HOW = (
    "clock around the framework's function that saves, plus clock from where it is about to call the optimizer's step() to the "
    "end of the pre-step hooks (the automatic fence); for either side"
)


def sequences_for(seconds: float, forward_backward: Callable[[int], Any]) -> int:
    """How many sequences let a forward and backward take at least so long.

    Args:
        forward_backward: is given a number of sequences.
    """
    count, taken = 1, 0.0
    while count < MOST_SEQUENCES:
        started = clock()
        forward_backward(count)
        taken = clock() - started
        if taken >= seconds:
            break
        count = math.ceil(count * min(4.0, 1.05 * seconds / taken))
        note(f"calibrating: {count} sequences")
    return count


def add_blocked(
    report: Report,
    workload: str,
    rival: str,
    ours: Sequence[Sample],
    theirs: Sequence[Sample],
    *,
    nbytes: int,
    flushes_s: Sequence[float],
) -> None:
    """
    Args:
        rival: what the framework's own checkpoints are called.
        ours, theirs: with the values blocked_s, save_s, fence_s and forward_backward_s.
        nbytes: of a checkpoint.
        flushes_s: from the beginning of a save of ours until it was durable, seconds.
    """
    medians = [{name: statistics.median(s.values[name] for s in side) for name in side[0].values} for side in (ours, theirs)]
    longest_s = max(flushes_s)
    longer = sum(sample.values["forward_backward_s"] > longest_s for sample in ours)
    condition = f"in {longer} of {len(ours)} rounds, flushes take at most {longest_s:.3g} s"
    for name, side, found in (("ckpt", ours, medians[0]), (rival, theirs, medians[1])):
        report.add(
            workload, name, "s", column(side, "blocked_s"), nbytes=nbytes, how=HOW, medians=found,
            forward_backward_longer_than_flush=condition,
        )  # fmt: skip
    pair = column(ours, "blocked_s"), column(theirs, "blocked_s")
    report.add_ratio(workload, f"ckpt / {rival}", *pair, nbytes=nbytes, how="blocked_s of both", bar=BAR)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
