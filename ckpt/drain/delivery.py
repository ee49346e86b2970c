"""Brings the part of one node to the inbox of a generation, file by file, and notes each stretch in the journal."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from ckpt.directory.node_place import NodePlace
from ckpt.drain import node as nodes
from ckpt.drain.copying import Copier, SourceError, part_path
from ckpt.drain.home import Home
from ckpt.drain.journal import Journal, Progress
from ckpt.drain.node import Generation
from ckpt.drain.pacing import Pace
from ckpt.drain.parts import Delivered, Part, parts_of
from ckpt.drain.stopping import Stop
from ckpt.errors import CheckpointError, CorruptError
from ckpt.storage import durable


def deliver(
    generation: Generation,
    place: NodePlace,
    home: Home,
    journal: Journal,
    pace: Pace,
    stop: Stop,
    *,
    direct: bool,
    wanted: bool,
) -> list[Delivered]:
    """All that this node has to deliver; goes on where the journal says. Returns what is to be in its receipt.

    Args:
        place: of this node in the save that has made it.
        direct: whether to go past the page cache, where that can be done.
        wanted: at home, also if something newer is there.

    Raises:
        CheckpointError: a file on the node is damaged, and was put aside; or it cannot be read any more.
        StorageError, InUseError: home cannot be written to.
        StoppedError: the drain was asked to end.
        OutdoneError: something that takes its place is at home.
    """
    token = home.open_inbox(generation, wanted)
    if journal.inbox != token:
        journal.inbox, journal.bytes = token, 0
        journal.files.clear()
    inbox, parts = home.inbox_of(generation.sequence), parts_of(generation.manifest, place)
    journal.total = sum(part.end - part.begin for part in parts)
    noted_at = time.monotonic()

    def note(copied: int) -> None:
        nonlocal noted_at
        now = time.monotonic()
        if copied and now > noted_at:
            journal.rate = copied / (now - noted_at)
        noted_at = now
        journal.bytes = sum(_delivered_bytes(part, journal) for part in parts)
        journal.write()

    copier = Copier(pace, stop, direct, note)
    try:
        for part in parts:
            progress = journal.files.setdefault(part.entry.name, Progress())
            final = inbox / part.entry.name
            there = part_path(final) if part.shared else final
            if not (progress.finished and os.path.lexists(there)):
                progress.finished = False
                _copy(copier, generation, final, part, progress)
                note(0)
    finally:
        copier.close()
    durable.crash_point("drain-all-copied")
    return [Delivered(part.entry.name, part.begin, part.end, journal.files[part.entry.name].part_crc32) for part in parts]


def _delivered_bytes(part: Part, journal: Journal) -> int:
    done = journal.files[part.entry.name].done if part.entry.name in journal.files else 0
    return max(0, min(done, part.end) - part.begin)


def _copy(copier: Copier, generation: Generation, final: Path, part: Part, progress: Progress) -> None:
    source = generation.directory / part.entry.name
    try:
        copier.copy(source, final, part, progress)
    except CorruptError as error:
        if nodes.still_there(generation):  # else its name may belong to another file by now
            nodes.quarantine(source)
        raise CorruptError(
            f"{error}; it was put aside as '{source.name}{nodes.DAMAGED}', and nothing of it is at home"
        ) from error
    except SourceError as error:
        if error.errno == errno.ENOENT:
            raise CheckpointError(f"'{source}' is gone") from error
        raise
