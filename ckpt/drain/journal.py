"""What has become of a generation on its way home: one small file for each, which says enough to go on after any end.

queued       it is complete on the node
copying      its files are on their way; `files` says how far
copied       this node has delivered its part
committed    it is a checkpoint at home
failed       `next` says when it is tried again; null: it is not. `blocked`: not by this node, which has delivered its part
superseded   it is not wanted at home any more; `by` is the sequence of what takes its place
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ckpt.directory.node_place import NodePlace
from ckpt.directory.step_names import names_in, step_name
from ckpt.errors import StorageError
from ckpt.storage import durable

logger = logging.getLogger("ckpt")

QUEUED, COPYING, COPIED, COMMITTED, FAILED, SUPERSEDED = "queued", "copying", "copied", "committed", "failed", "superseded"
STATES = (QUEUED, COPYING, COPIED, COMMITTED, FAILED, SUPERSEDED)
FOLDER = "drain"
_FORMAT = 1
_MOST_OLD = 50  # of generations that are gone


class Followed(Protocol):
    """A generation: see Journal."""

    @property
    def sequence(self) -> int: ...

    @property
    def identity(self) -> int: ...


@dataclasses.dataclass
class Progress:
    """Of one file.

    Attributes:
        done: bytes that were read and, as far as they are this node's to deliver, written durably.
        crc32: of these.
        part_crc32: of those of them that this node delivers.
        finished: whether all of it lies at home, and was found to be what the manifest says.
    """

    done: int = 0
    crc32: int = 0
    part_crc32: int = 0
    finished: bool = False


@dataclasses.dataclass
class Journal:
    """
    Attributes:
        identity: CRC-32 of the manifest on the node.
        place: of this node in the save that has made it; None: an older version has written it.
        name: of its directory at home; empty, as in older journals: that of the step.
        inbox: token of the directory at home that `files` speaks of; see home.py.
        files: by name.
        total, bytes: that this node has to deliver, and has delivered.
        rate: bytes a second, as measured last.
        began, ended: Unix times, of the copying; 0: not yet.
        unwritten: whether the node did not take what was changed last.
    """

    path: Path
    sequence: int
    step: int
    identity: int
    place: NodePlace | None = None
    inbox: str = ""
    state: str = QUEUED
    files: dict[str, Progress] = dataclasses.field(default_factory=dict)
    attempts: int = 0
    next: float | None = None
    errno: int = 0
    text: str = ""
    total: int = 0
    bytes: int = 0
    rate: float = 0.0
    began: float = 0.0
    ended: float = 0.0
    by: int = 0
    blocked: bool = False
    unwritten: bool = False
    name: str = ""

    @property
    def name_at_home(self) -> str:
        return self.name or step_name(self.step)

    @property
    def waits(self) -> bool:
        """Whether anything is left to copy."""
        return self.state in (QUEUED, COPYING) or (self.state == FAILED and self.next is not None)

    @property
    def is_over(self) -> bool:
        return not self.waits and self.state != COPIED

    def write(self) -> None:
        """In passing: a crash of the machine may leave what was there before."""
        try:
            durable.replace_quickly(self.path, to_json(self))
        except StorageError as error:  # after an end more is done again
            logger.warning("%s", error)

    def change(self, state: str, **fields: Any) -> None:
        """Durably, if the node can be written to.

        Args:
            fields: new values of other attributes.
        """
        self.state = state
        for name, value in fields.items():
            setattr(self, name, value)
        if self.is_over and self.ended == 0:
            self.ended = time.time()
        try:
            durable.replace_durably(self.path, to_json(self), "journal")
        except StorageError as error:
            if not self.unwritten:
                logger.warning("%s", error)
            self.unwritten = True
        else:
            self.unwritten = False


def follow(
    journals: dict[int, Journal],
    generations: Sequence[Followed],
    make: Callable[[Any], Journal],
    forgo: Callable[[Journal, int], None],
) -> None:
    """Gives each generation a journal, ends those of generations that are there no more, and removes old ones.

    Args:
        journals: by sequence.
        generations: that are there now.
        make: for a new one.
        forgo: ends one, before anything was carried; gets the highest sequence that is there, or -1.
    """
    for generation in generations:
        sequence = generation.sequence
        known = journals.get(sequence)
        if known is None or known.identity != generation.identity:
            journals[sequence] = make(generation)
            journals[sequence].change(QUEUED)
    there = {generation.sequence for generation in generations}
    gone = sorted(journals.keys() - there)
    for journal in [journals[sequence] for sequence in gone if journals[sequence].waits]:
        forgo(journal, max(there, default=-1))
    for sequence in [sequence for sequence in gone if journals[sequence].is_over][:-_MOST_OLD]:
        with contextlib.suppress(OSError):
            durable.remove_file(journals.pop(sequence).path)


def write_again(journals: Iterable[Journal]) -> None:
    """Those of which the disk did not take the last change: it may have been full."""
    for journal in journals:
        if journal.unwritten:
            journal.change(journal.state)


def to_json(journal: Journal) -> bytes:
    """What read() takes."""
    document = {"format": _FORMAT, **dataclasses.asdict(journal)}
    del document["path"], document["unwritten"]
    return json.dumps(document, indent=1).encode()


def path_of(root: Path, sequence: int) -> Path:
    return root / FOLDER / f"{sequence:012d}.json"


def read(path: Path) -> Journal | None:
    """None if there is none that can be understood: then all begins anew."""
    try:
        document = json.loads(path.read_bytes())
        if document.pop("format") != _FORMAT or document["state"] not in STATES:
            return None
        files = {name: Progress(**said) for name, said in document.pop("files").items()}
        place = document.pop("place", None)
        return Journal(path=path, files=files, place=None if place is None else NodePlace.parse(place), **document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_all(root: Path) -> list[Journal]:
    """Newest first.

    Raises:
        StorageError: the directory cannot be read.
    """
    names = sorted((name for name in names_in(root / FOLDER) if _is_journal(name)), reverse=True)
    return [journal for name in names if (journal := read(root / FOLDER / name)) is not None]


def _is_journal(name: str) -> bool:
    stem, suffix = os.path.splitext(name)
    return suffix == ".json" and stem.isdecimal()
