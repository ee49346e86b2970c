"""How far the drain of a node has come, for whoever asks: taken from the journals, whether the drain runs or not."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

from ckpt.drain import journal as journals

STUCK = "stuck"
_STUCK_AFTER_S = 60.0  # a drain that copies writes its journal every second


@dataclasses.dataclass(frozen=True)
class DrainStatus:
    """One generation.

    Attributes:
        state: as in journal.py; or "stuck": it is being copied, but nothing has moved for a minute, because the drain hangs, or
            has ended on the way.
        bytes, total_bytes: delivered, and to be delivered by this node.
        rate: bytes a second.
        attempts: how often it has failed; `text` says how.
        next: Unix time of the next attempt; None: there will be none.
        superseded_by: the sequence of what took its place; 0: none.
        began, ended: Unix times; 0: not yet.
    """

    sequence: int
    step: int
    state: str
    bytes: int
    total_bytes: int
    rate: float
    attempts: int
    next: float | None
    text: str
    superseded_by: int
    began: float
    ended: float


def status(node_root: str | os.PathLike[str]) -> list[DrainStatus]:
    """Newest generation first.

    Raises:
        StorageError: the directory cannot be read.
    """
    return [_status_of(journal) for journal in journals.read_all(Path(node_root))]


def _status_of(journal: journals.Journal) -> DrainStatus:
    state = journal.state
    if state == journals.COPYING and time.time() - _written_at(journal.path) > _STUCK_AFTER_S:
        state = STUCK
    return DrainStatus(
        sequence=journal.sequence,
        step=journal.step,
        state=state,
        bytes=journal.bytes,
        total_bytes=journal.total,
        rate=journal.rate,
        attempts=journal.attempts,
        next=journal.next,
        text=journal.text,
        superseded_by=journal.by,
        began=journal.began,
        ended=journal.ended,
    )


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
