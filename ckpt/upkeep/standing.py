"""How a directory of checkpoints stands: who saves there, when the last commit was, and what is left to be carried on."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from ckpt.directory.holds import FOLDER
from ckpt.directory.step_names import is_step_name, names_in
from ckpt.drain import node as nodes
from ckpt.drain import remote_place
from ckpt.drain.backlog import Backlog, backlog_of
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.upkeep.census import WEIGHTS, look
from ckpt.upkeep.room import room_of
from ckpt.upkeep.rows import COMMITTED, DAMAGED, INCOMPLETE, PREPARED, Row, is_hidden


@dataclasses.dataclass(frozen=True)
class PlainFiles:
    """Checkpoints of one file each, as ckpt.save(), torch.save() and Lightning make them: there is no commit of these.

    Attributes:
        bytes: of all.
        newest: name of the one that was written last.
        written: when that was, Unix time.
    """

    count: int
    bytes: int
    newest: str
    newest_bytes: int
    written: float


@dataclasses.dataclass(frozen=True)
class Standing:
    """
    Attributes:
        holder: of the lock, in words; None: no job saves there.
        newest: the last commit; None: there is none.
        in_flight: being saved just now, as far as that can be told; without a holder: what a crash has left.
        damaged: names.
        bytes: of all that are committed, by their sizes.
        on_disk: bytes that these take of the disk: less, where they share.
        files: where nothing is committed: see PlainFiles; None: there are none, either.
    """

    holder: str | None
    newest: Row | None
    committed: int
    in_flight: list[Row]
    damaged: list[str]
    backlogs: list[Backlog]
    files: PlainFiles | None = None
    bytes: int = 0
    on_disk: int = 0


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
        files=None if committed else _files_in(directory),
        bytes=sum(row.bytes for row in committed),
        on_disk=room_of(directory, [row.name for row in committed]).taken,
    )


def _files_in(directory: Path) -> PlainFiles | None:
    if is_step_name(directory.absolute().name):
        return None  # of a step that is no checkpoint, or none any more
    found = []
    for name in sorted(names_in(directory)):
        path = directory / name
        if name.endswith(WEIGHTS) and not is_hidden(name) and not path.is_symlink():
            with contextlib.suppress(OSError):  # it may just go
                stat = path.stat()
                if path.is_file():
                    found.append((stat.st_mtime, name, stat.st_size))
    if not found:
        return None
    written, newest, size = max(found)
    return PlainFiles(len(found), sum(each[2] for each in found), newest, size, written)


def _backlogs(directory: Path) -> list[Backlog]:
    found = []
    if (directory / nodes.NAME).exists():
        found.append(backlog_of(directory, str(nodes.read(directory).home)))
    for place in sorted(names_in(directory / FOLDER)):
        remote = remote_place.read_if_any(directory / FOLDER / place)
        if remote is not None:
            found.append(backlog_of(directory / FOLDER / place, remote.url))
    return found
