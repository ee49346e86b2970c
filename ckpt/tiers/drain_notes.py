"""What a drain's journal says of a checkpoint, as numbers and events. One process tells it for each drain: its starter."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ckpt.drain.backlog import left_below
from ckpt.drain.journal import COMMITTED, FAILED, SUPERSEDED, Journal
from ckpt.errors import StorageError
from ckpt.metrics.events import Note, ignore
from ckpt.metrics.noting import note_drained, note_retries


def tell(journal: Journal, told_attempts: int, tier: str, root: Path, note: Note) -> int:
    """Once for each change of the journal.

    Args:
        told_attempts: the failed attempts that were told of before.
        tier: to which it is carried.
        root: where the journals of this drain are.
        note: gets the event, if that is its end.

    Returns:
        The failed attempts that have been told of by now.
    """
    note_retries(tier, journal.attempts - told_attempts, journal.errno)
    if journal.state in (COMMITTED, SUPERSEDED) or (journal.state == FAILED and journal.next is None):
        _tell_end(journal, tier, root, note)
    return max(journal.attempts, told_attempts)


def _tell_end(journal: Journal, tier: str, root: Path, note: Note) -> None:
    ended = journal.ended or None
    began = journal.began or None
    if began is not None and ended is not None:
        note_drained(tier, journal.state, ended - began)
    if note is ignore:
        return
    pending: int | None = None
    left: int | None = None
    with contextlib.suppress(StorageError):
        pending, left = left_below(root)
    error = {"message": journal.text} if journal.state == FAILED else None
    note(
        "drain",
        tier=tier,
        step=journal.step,
        sequence=journal.sequence,
        outcome=journal.state,
        began=began,
        ended=ended,
        bytes=journal.bytes,
        attempts=journal.attempts,
        pending=pending,
        backlog_bytes=left,
        error=error,
    )
