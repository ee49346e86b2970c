"""What a rank has written of a step on the disk of its node, and made durable: a small file of each rank.

A node whose ranks have all left theirs holds all that it is to hold, also if the job ended before it could say so. They say,
too, which node of how many it is in this save, and which ranks it has: the drain delivers by that, whatever the next job is.

A step that is saved again gets receipts of other names beside the old ones, which go when its manifest does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.directory.step_names import names_in
from ckpt.storage import durable

_PREFIX = "receipt-"


class Receipt(NamedTuple):
    """Of one rank: the files that it has written durably, in a save of the job that has this token.

    Attributes:
        place: of its node; None: an older version has written it.
    """

    rank: int
    token: str
    files: tuple[FileEntry, ...]
    place: NodePlace | None = None

    def is_of(self, manifest: Manifest) -> bool:
        """Whether it speaks of this commit: another save to the same step has other names."""
        return bool(self.files) and set(self.files) <= set(manifest.files)


def write_receipt(directory: Path, rank: int, files: Sequence[FileEntry], token: str, place: NodePlace | None = None) -> Path:
    """Says durably that `files`, whose bytes are durable already, are what this rank has written; so are their names then.

    Args:
        directory: of the step.
        token: of the job.

    Returns:
        Where it is. What belongs to the manifest that stands there is not replaced.

    Raises:
        StorageError: it cannot be written.
    """
    document = {
        "format": manifests.FORMAT,
        "rank": rank,
        "token": token,
        "files": [dataclasses.asdict(file) for file in files],
        "place": None if place is None else dataclasses.asdict(place),
    }
    path = directory / _free_name(directory, rank)
    durable.sync_directory(directory.parent)  # the step directory is new, mostly
    durable.replace_durably(path, manifests.with_checksum(document), "receipt")
    return path


def _free_name(directory: Path, rank: int) -> str:
    names = [f"{_PREFIX}{rank:05d}.json", f"{_PREFIX}{rank:05d}-2.json"]
    before = manifests.read_if_any(directory)
    first = _read(directory / names[0])
    return names[before is not None and first is not None and first.is_of(before)]


def read_receipts(directory: Path) -> list[Receipt]:
    """Of all ranks that have one there; what is none is passed over.

    Raises:
        StorageError: the directory cannot be read.
    """
    return [receipt for _, receipt in _receipts(directory)]


def _receipts(directory: Path) -> Iterator[tuple[Path, Receipt]]:
    for name in sorted(names_in(directory)):
        if is_receipt(name) and (receipt := _read(directory / name)) is not None:
            yield directory / name, receipt


def is_receipt(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(".json")


def _read(path: Path) -> Receipt | None:
    try:
        said = manifests.parse_checked(path.read_bytes())
        place = None if said.get("place") is None else NodePlace.parse(said["place"])
        return Receipt(int(said["rank"]), str(said["token"]), manifests.parse_files(said["files"]), place)
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def place_in(directory: Path, manifest: Manifest) -> NodePlace | None:
    """Which node this was when the commit was made, by its receipts; None if there are none that say so.

    Raises:
        StorageError: the directory cannot be read.
    """
    places = (receipt.place for receipt in read_receipts(directory) if receipt.is_of(manifest))
    return next((place for place in places if place is not None), None)


def names_of_receipts(directory: Path, manifest: Manifest) -> set[str]:
    """Of this commit.

    Raises:
        StorageError: the directory cannot be read.
    """
    return {path.name for path, receipt in _receipts(directory) if receipt.is_of(manifest)}
