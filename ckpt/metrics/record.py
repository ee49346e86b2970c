"""One save that has ended, and who is told of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from ckpt.errors import SkippedError
from ckpt.metrics.stats import SaveStats

logger = logging.getLogger("ckpt")

Outcome = Literal["committed", "failed", "skipped"]


@dataclasses.dataclass(frozen=True)
class SaveRecord:
    """
    Attributes:
        path: where it is, or was to be, published.
        outcome: "committed" (durable and published), "failed", or "skipped" (`Options.when_busy`).
        error: why not; None if it was committed.
        stats: what it has cost this process.
        sequence: the number of its commit in its directory; None if it was not committed.
        slowest_rank: whose files took longest to be durable, of several ranks; None if that is not known.
        all_ranks: of a committed save of several ranks: `bytes_total` of the checkpoint, and `blocked_s` and `flushed_s` of the
            rank that had most of each, as far as that was known when it was published.
    """

    rank: int
    world_size: int
    step: int | None
    path: Path
    outcome: Outcome
    error: BaseException | None
    stats: SaveStats
    sequence: int | None = None
    slowest_rank: int | None = None
    all_ranks: Mapping[str, float] = dataclasses.field(default_factory=dict)


def outcome_of(error: BaseException | None) -> Outcome:
    return "committed" if error is None else "skipped" if isinstance(error, SkippedError) else "failed"


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
                raise TypeError(
                    f"metrics= takes objects with saved() and close(), and {type(sink).__name__} has not both; a function "
                    "that is to get a dict for each save is given as ckpt.metrics.callback(function)"
                )

    def tell(self, record: SaveRecord) -> None:
        for sink in self._sinks:
            try:
                sink.saved(record)
            except Exception:
                logger.exception("%s failed to note the save to '%s'", type(sink).__name__, record.path)

    def close(self) -> None:
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            try:
                sink.close()
            except Exception:
                logger.exception("%s failed to close", type(sink).__name__)
