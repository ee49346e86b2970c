"""What a save has cost as one flat dict, as loggers of training want it: W&B, MLflow, TensorBoard, those of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckpt.metrics.record import SaveRecord
from ckpt.metrics.stats import SaveStats

Figures = dict[str, float]


def figures(saved: SaveRecord | SaveStats) -> Figures:
    """`checkpoint/...`, numbers all: blocked_s, save_s, fence_s (seconds that training was held, in all and by where), bytes;
    once it is durable also durable_s (seconds from save() on) and gb_per_s (10^9 bytes a second).

    Of a SaveRecord also failed (0 or 1; a save that was skipped has not failed), and committed_step if it was committed.
    """
    stats = saved.stats if isinstance(saved, SaveRecord) else saved
    found = {
        "checkpoint/blocked_s": stats.blocked_s,
        "checkpoint/save_s": stats.save_s,
        "checkpoint/fence_s": stats.fence_s,
        "checkpoint/bytes": float(stats.bytes_total),
    }
    if stats.durable_s is not None:
        found["checkpoint/durable_s"] = stats.durable_s
        found["checkpoint/gb_per_s"] = stats.bytes_total / stats.durable_s / 1e9 if stats.durable_s else 0.0
    if isinstance(saved, SaveRecord):
        found["checkpoint/failed"] = float(saved.outcome == "failed")
        if saved.outcome == "committed" and saved.step is not None:
            found["checkpoint/committed_step"] = float(saved.step)
    return found


class CallbackSink:
    """See callback()."""

    def __init__(self, function: Callable[[Figures], object]) -> None:
        self._function = function

    def saved(self, record: SaveRecord) -> None:
        if record.outcome != "skipped":
            self._function(figures(record))

    def close(self) -> None:
        """Nothing is open."""


def callback(function: Callable[[Figures], Any]) -> CallbackSink:
    """For `metrics=`: the function is called with the figures() of each save that has ended, on a thread of the Checkpointer.

    Not for saves that were skipped. What it raises is logged, and fails no save.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(function):
        raise TypeError(f"callback() takes a function of one dict, not {type(function).__name__}")
    return CallbackSink(function)
