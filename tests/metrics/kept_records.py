"""A sink that keeps what it is told."""

from __future__ import annotations

from ckpt.metrics import SaveRecord


class Kept:
    def __init__(self) -> None:
        self.records: list[SaveRecord] = []
        self.closed = 0

    def saved(self, record: SaveRecord) -> None:
        assert not self.closed
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1
