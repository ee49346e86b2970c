"""What a rank has written of a step on the disk of its node, and made durable: a small file of each rank.

A node whose ranks have all left theirs holds all that it is to hold, also if the job ended before it could say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry
from ckpt.directory.step_names import names_in
from ckpt.storage import durable

_PREFIX = "receipt-"


class Receipt(NamedTuple):
    """Of one rank: the files that it has written durably, in the save that has this token."""

    rank: int
    token: str
    files: tuple[FileEntry, ...]


def receipt_path(directory: Path, rank: int) -> Path:
    """
    Args:
        directory: of the step.
    """
    return directory / f"{_PREFIX}{rank:05d}.json"


def write_receipt(directory: Path, rank: int, files: Sequence[FileEntry], token: str) -> None:
    """Says durably that `files`, whose bytes are durable already, are what this rank has written; so are their names then.

    Args:
        token: names the save, the same on all ranks.

    Raises:
        StorageError: it cannot be written.
    """
    document = {
        "format": manifests.FORMAT,
        "rank": rank,
        "token": token,
        "files": [dataclasses.asdict(file) for file in files],
    }
    durable.sync_directory(directory.parent)  # the step directory is new, mostly
    durable.replace_durably(receipt_path(directory, rank), manifests.with_checksum(document), "receipt")


def read_receipts(directory: Path) -> list[Receipt]:
    """Of all ranks that have one there; what is none is passed over.

    Raises:
        StorageError: the directory cannot be read.
    """
    found = []
    for name in sorted(names_in(directory)):
        if name.startswith(_PREFIX) and name.endswith(".json"):
            try:
                said = manifests.parse_checked((directory / name).read_bytes())
                found.append(Receipt(int(said["rank"]), str(said["token"]), manifests.parse_files(said["files"])))
            except (OSError, KeyError, TypeError, ValueError, RecursionError):
                continue
    return found
