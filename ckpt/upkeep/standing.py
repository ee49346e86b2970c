"""How a directory of checkpoints stands: who saves there, when the last commit was, and what is left to be carried on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ckpt.directory.holds import FOLDER
from ckpt.directory.step_names import names_in
from ckpt.drain import journal as journals
from ckpt.drain import node as nodes
from ckpt.drain import remote_place, status
from ckpt.drain.progress import STUCK
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.upkeep.census import look
from ckpt.upkeep.rows import COMMITTED, DAMAGED, INCOMPLETE, PREPARED, Row

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


@dataclasses.dataclass(frozen=True)
class Standing:
    """
    Attributes:
        holder: of the lock, in words; None: no job saves there.
        newest: the last commit; None: there is none.
        in_flight: being saved just now, as far as that can be told; without a holder: what a crash has left.
        damaged: names.
    """

    holder: str | None
    newest: Row | None
    committed: int
    in_flight: list[Row]
    damaged: list[str]
    backlogs: list[Backlog]


def look_at(directory: Path) -> Standing:
    """
    Raises:
        NotACheckpointError: there is no such directory.
        StorageError: it cannot be read.
    """
    rows = look(directory)
    committed = [row for row in rows if row.state == COMMITTED]
    return Standing(
        holder=DirectoryLock(directory).holder(),
        newest=committed[0] if committed else None,
        committed=len(committed),
        in_flight=[row for row in rows if row.state in (INCOMPLETE, PREPARED)],
        damaged=[row.name for row in rows if row.state == DAMAGED],
        backlogs=_backlogs(directory),
    )


def _backlogs(directory: Path) -> list[Backlog]:
    found = []
    if (directory / nodes.NAME).exists():
        found.append(_backlog(directory, str(nodes.read(directory).home)))
    for place in sorted(names_in(directory / FOLDER)):
        remote = remote_place.read_if_any(directory / FOLDER / place)
        if remote is not None:
            found.append(_backlog(directory / FOLDER / place, remote.url))
    return found


def _backlog(root: Path, target: str) -> Backlog:
    known = status(root)
    failed = [each for each in known if each.state == journals.FAILED]
    waiting = [each for each in known if each.state in _WAITING or (each.state == journals.FAILED and each.next is not None)]
    return Backlog(
        target=target,
        known=len(known),
        pending=len(waiting),
        bytes=sum(max(0, each.total_bytes - each.bytes) for each in waiting),
        rate=next((each.rate for each in known if each.rate), 0.0),
        stuck=sum(each.state == STUCK for each in waiting),
        failed=len(failed),
        text=failed[0].text if failed else "",
        running=DirectoryLock(root, name=nodes.LOCK).holder() is not None,
    )
