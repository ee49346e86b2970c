"""One save that has ended, and who is told of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

from ckpt.errors import SkippedError
from ckpt.saving.pending import PendingSave, SaveStats
from ckpt.saving.task import SaveTask

logger = logging.getLogger("ckpt")


@dataclasses.dataclass(frozen=True)
class SaveRecord:
    """
    Attributes:
        path: where it is, or was to be, published.
        outcome: "committed" (durable and published), "failed", or "skipped" (`Options.when_busy`).
        error: why not; None if it was committed.
        stats: what it has cost this process.
    """

    rank: int
    world_size: int
    step: int | None
    path: Path
    outcome: Literal["committed", "failed", "skipped"]
    error: BaseException | None
    stats: SaveStats


class MetricsSink(Protocol):
    """Is told of each save of one Checkpointer. What it raises is logged, and never fails a save."""

    def saved(self, record: SaveRecord) -> None:
        """Called once for each save that has ended, in their order, before its `result()` returns. Saves behind it wait.

        On a thread of the Checkpointer; for a save that was skipped, inside save().
        """

    def close(self) -> None:
        """Called once, when the Checkpointer is closed: no record comes after it."""


class Sinks:
    """Those of one Checkpointer.

    Raises:
        TypeError: one of them has no saved() or close().
    """

    def __init__(self, sinks: Iterable[MetricsSink]) -> None:
        self._sinks = tuple(sinks)
        for sink in self._sinks:
            if not (callable(getattr(sink, "saved", None)) and callable(getattr(sink, "close", None))):
                raise TypeError(f"metrics= takes objects with saved() and close(), and {type(sink).__name__} has not both")

    def note(self, task: SaveTask, error: BaseException | None, rank: int, world_size: int) -> None:
        """The outcome of a save, just before it is known to those who wait for it."""
        if not self._sinks:
            return
        outcome: Literal["committed", "failed", "skipped"] = (
            "committed" if error is None else "skipped" if isinstance(error, SkippedError) else "failed"
        )
        record = SaveRecord(rank, world_size, task.step, task.path, outcome, error, PendingSave(task).stats)
        for sink in self._sinks:
            try:
                sink.saved(record)
            except Exception:
                logger.exception("%s failed to note the save to '%s'", type(sink).__name__, task.path)

    def close(self) -> None:
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            try:
                sink.close()
            except Exception:
                logger.exception("%s failed to close", type(sink).__name__)
