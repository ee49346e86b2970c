"""ckpt as one of the rivals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ckpt
from bench.rivals.base import KEEP, Rival


class Ckpt(Rival):
    """A Checkpointer.

    Args:
        lazy: as `Checkpointer.save` has it; None: what an optimizer owns.
        options, coordinator: the Checkpointer's.
        replicated: the state is the same on all ranks.
        node: a directory on the disk of each node, by way of which it is saved; durable is what lies there.

    Attributes:
        home_at: clock() when the newest checkpoint had come home, by way of nodes; NaN without them.
    """

    name = "ckpt"
    configuration = "Checkpointer, Options(): durable, with a manifest, and old ones removed, by itself"
    copies = 0
    ours = True

    def __init__(
        self,
        directory: Path,
        keep: int = KEEP,
        lazy: bool | None = None,
        *,
        options: ckpt.Options | None = None,
        coordinator: str = "local",
        replicated: bool = False,
        node: Path | None = None,
    ) -> None:
        super().__init__(directory, keep)
        self._lazy, self._replicated = lazy, replicated
        self._options, self._coordinator = options, coordinator
        self._tiers = [] if node is None else [ckpt.Tier.node(node)]
        self._pending: ckpt.PendingSave | None = None
        self.home_at = math.nan

    def open(self) -> None:
        self._checkpointer = ckpt.Checkpointer(
            self.directory, keep=self.keep, options=self._options, coordinator=self._coordinator, tiers=self._tiers
        )

    @property
    def stats(self) -> ckpt.SaveStats:
        """Of the newest save."""
        assert self._pending is not None
        return self._pending.stats

    def save(self, state: dict[str, Any]) -> None:
        self._saves += 1
        what = {"replicated": state} if self._replicated else {"state": state}
        self._pending = self._checkpointer.save(self._saves, **what, lazy=self._lazy)

    def before_step(self) -> None:
        """Nothing: the optimizer's step fences by itself, and that is on the clock of the step."""

    def finish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self.flushed_at = self.stats.flushed_at or self.stats.started_at or math.nan  # the latter: it writes nothing
            self.durable_at = self.stats.durable_at or math.nan
            if self._tiers:
                self.durable_at, self.home_at = self.stats.tier_at.get("node", math.nan), self.durable_at

    def synchronise(self) -> None:
        """Nothing: what it calls complete is durable."""

    def load(self, into: dict[str, Any]) -> None:
        found = self._checkpointer.restore(into=into)
        assert found is not None and found.step == self._saves

    def prune(self) -> None:
        """Nothing: it has done so itself, behind the save."""

    def close(self) -> None:
        self._checkpointer.close()
