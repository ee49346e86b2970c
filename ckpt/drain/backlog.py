"""What a drain has still to carry, taken from its journals."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ckpt.drain import journal as journals
from ckpt.drain import node as nodes
from ckpt.drain.progress import STUCK, DrainStatus, status
from ckpt.metrics.registry import Reading
from ckpt.storage.directory_lock import DirectoryLock

_WAITING = (journals.QUEUED, journals.COPYING, STUCK)


@dataclasses.dataclass(frozen=True)
class Backlog:
    """What a drain has still to carry to `target`: a home, or the URL of a place in an object store.

    Attributes:
        known: checkpoints of which it has noted anything.
        pending: those that are not there yet.
        bytes: of them that are not there yet.
        rate: bytes a second, as measured last; 0: not yet.
        stuck: how many of them do not move.
        failed: how many failed last time; `text` says how the newest of these did.
        running: whether the drain is there just now.
    """

    target: str
    known: int
    pending: int
    bytes: int
    rate: float
    stuck: int
    failed: int
    text: str
    running: bool


def backlog_of(root: str | os.PathLike[str], target: str) -> Backlog:
    """
    Args:
        root: where the drain has its journals.

    Raises:
        StorageError: it cannot be read.
    """
    known = status(root)
    failed = [each for each in known if each.state == journals.FAILED]
    waiting = _waiting(known)
    return Backlog(
        target=target,
        known=len(known),
        pending=len(waiting),
        bytes=_left(waiting),
        rate=next((each.rate for each in known if each.rate), 0.0),
        stuck=sum(each.state == STUCK for each in waiting),
        failed=len(failed),
        text=failed[0].text if failed else "",
        running=DirectoryLock(Path(root), name=nodes.LOCK).holder() is not None,
    )


def _waiting(known: Iterable[DrainStatus]) -> list[DrainStatus]:
    return [each for each in known if each.state in _WAITING or (each.state == journals.FAILED and each.next is not None)]


def _left(waiting: Iterable[DrainStatus]) -> int:
    return sum(max(0, each.total_bytes - each.bytes) for each in waiting)


def left_below(root: Path) -> tuple[int, int]:
    """How many checkpoints wait there, and how many of their bytes are not where they are to go."""
    waiting = _waiting(status(root))
    return len(waiting), _left(waiting)


def gauges(root: Path, tier: str) -> Iterator[Reading]:
    """The same, as Registry.watch() wants it."""
    pending, left = left_below(root)
    yield "ckpt.drain.pending", pending, {"tier": tier}
    yield "ckpt.drain.backlog", left, {"tier": tier}
