"""Frozen tensors in files of their own, in a step directory.

    state.pt            what rank 0 gave; or rank-00000.pt, ...: the pickle, and all records but those of frozen tensors
    state.frozen.pt     these: a torch file like any other, of a dict of tensors by their paths in the state

The first has a small record that says where the others are: for the number by which its pickle knows a record, the number of
that in the other file. Readers that do not know of this find no such record, and say so. As long as nothing of it changes, the
other file is the same one in each step, by links: it is never written to again.

Of sharded states it takes no more than that: `.metadata` names the file of each part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FROZEN, RANK, FileEntry, Manifest
from ckpt.errors import CheckpointError, CorruptError

RECORD = ".data/frozen"  # of the file that refers to another
IDENTITY = ".data/serialization_id"  # of that
_FORMAT = 1


class FrozenReference(NamedTuple):
    """
    Attributes:
        file: the name of the other file, which lies beside.
        identity: its serialization id, by which it is told from every other one.
        numbers: of the records that are in there: by the number here, that in the other file.
    """

    file: str
    identity: str
    numbers: Mapping[int, int]

    def to_bytes(self) -> bytes:
        said = {"format": _FORMAT, "file": self.file, "id": self.identity, "records": list(self.numbers.items())}
        return json.dumps(said, separators=(",", ":")).encode()

    @staticmethod
    def parse(content: bytes) -> FrozenReference:
        """
        Raises:
            CorruptError: it is not what to_bytes() makes.
            CheckpointError: a newer version has made it.
        """
        try:
            said = json.loads(content)
            made = said["format"]
            if made != _FORMAT:
                raise CheckpointError(f"its frozen tensors are kept in the format {made!r}, which this version does not know")
            if not manifests.is_plain_name(said["file"]):
                raise ValueError(f"{said['file']!r} is no plain name")
            numbers = {int(here): int(there) for here, there in said["records"]}
            return FrozenReference(said["file"], str(said["id"]), numbers)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CorruptError(f"what it says of its frozen tensors cannot be read: {error}") from error


def entry_beside(directory: Path, name: str) -> FileEntry | None:
    """What the manifest there says of such a file; None if it names none, or there is no manifest."""
    manifest = manifests.read_if_any(directory)
    files = () if manifest is None else manifest.files
    return next((file for file in files if file.kind == FROZEN and file.name == name), None)


def companion_of(manifest: Manifest, file: FileEntry) -> FileEntry | None:
    """The entry of the frozen tensors of a file of a rank; None: it has all of them itself."""
    if file.kind != RANK:
        return None
    return next((other for other in manifest.files if other.kind == FROZEN and other.rank == file.rank), None)
