"""What saves have cost, for the loggers of a trainer. They are told on the thread that trains: loggers expect that."""

from __future__ import annotations

import threading
from typing import Any

import ckpt
from ckpt import metrics


class Figures:
    """Of saves that have ended and were not told yet."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._ended: list[dict[str, float]] = []  # guarded by _guard

    def note(self, pending: Any, error: BaseException | None) -> None:
        """On a thread of the library."""
        figures = {"checkpoint/failed": float(error is not None)}
        stats = getattr(pending, "stats", None)
        if isinstance(stats, ckpt.SaveStats):
            figures |= metrics.figures(stats)
        with self._guard:
            self._ended.append(figures)

    def tell(self, trainer: Any) -> None:
        """The step is that at which they are told: some loggers take no older one."""
        with self._guard:
            ended, self._ended = self._ended, []
        for figures in ended:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
