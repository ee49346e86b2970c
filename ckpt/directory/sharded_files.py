"""The files of a sharded state in a step directory. Their names are those that torch.distributed.checkpoint gives.

    .metadata           what lies where, for readers of torch
    __0_0.distcp  ...   what each rank has written
    __0_0.crc32   ...   the CRC-32 of each piece of that, and where the bytes of tensors are, so that parts can be read

Readers of torch look for `.metadata` alone. A step that is saved again has another file for it beside the old one
(.metadata-2), which the manifest names; behind the manifest `.metadata` becomes a copy of that. A crash in between leaves the
old one, whose data files are still there, and the next job that saves mends it.
"""

from __future__ import annotations

import array
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt.directory.manifest import SHARDED_METADATA, Manifest
from ckpt.errors import CorruptError
from ckpt.storage import durable

METADATA = ".metadata"
_MAGIC = b"ckptcrc1"
_HEAD = struct.Struct("<8sQQQ")  # magic, bytes of the data file, bytes of a piece, number of payloads


def checksums_path(data: Path) -> Path:
    """Of the file with the checksums of a data file."""
    return data.with_suffix(".crc32")


class PieceChecksums(NamedTuple):
    """
    Attributes:
        file_bytes: of the data file.
        piece_bytes: the first piece begins at 0, each is as long as that, and the last may be shorter.
        payloads: by the offset of an archive, where its payload begins: only of archives that hold a contiguous tensor.
    """

    file_bytes: int
    piece_bytes: int
    crc32s: Sequence[int]
    payloads: Mapping[int, int] = {}

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(_MAGIC, self.file_bytes, self.piece_bytes, len(self.payloads))
        places = array.array("Q", (number for place in self.payloads.items() for number in place))
        return head + array.array("I", self.crc32s).tobytes() + places.tobytes()

    @staticmethod
    def parse(content: bytes) -> PieceChecksums:
        """
        Raises:
            CorruptError: it is not what to_bytes() makes.
        """
        crc32s, places = array.array("I"), array.array("Q")
        try:
            magic, file_bytes, piece_bytes, count = _HEAD.unpack_from(content)
            begin = len(content) - 16 * count
            crc32s.frombytes(content[_HEAD.size : begin])
            places.frombytes(content[begin:])
        except (struct.error, ValueError) as error:
            raise CorruptError(f"the checksums of a data file cannot be read: {error}") from error
        if magic != _MAGIC or piece_bytes == 0 or len(crc32s) != -(-file_bytes // piece_bytes):
            raise CorruptError("the checksums of a data file do not fit it")
        return PieceChecksums(file_bytes, piece_bytes, crc32s, dict(zip(places[::2], places[1::2], strict=True)))


def metadata_name(manifest: Manifest | None) -> str | None:
    """The file that the manifest names as metadata; None if the step has no sharded state."""
    files = () if manifest is None else manifest.files
    return next((file.name for file in files if file.kind == SHARDED_METADATA), None)


def names_of(manifest: Manifest) -> set[str]:
    """Of all files of a step: also of the copy that the manifest does not name."""
    copy = {METADATA} if metadata_name(manifest) is not None else set()
    return {file.name for file in manifest.files} | copy


def mend(directory: Path, manifest: Manifest) -> None:
    """Lets `.metadata` be what the manifest names."""
    if needs_mending(directory, manifest):
        content = (directory / str(metadata_name(manifest))).read_bytes()
        durable.replace_durably(directory / METADATA, content, "metadata-copy")


def needs_mending(directory: Path, manifest: Manifest) -> bool:
    """Whether it is something else. Not if the manifest names it, or what it is to be lies on another node."""
    name = metadata_name(manifest)
    if name is None or name == METADATA or not os.path.lexists(directory / name):
        return False
    try:
        return (directory / METADATA).read_bytes() != (directory / name).read_bytes()
    except FileNotFoundError:
        return True


def foreign_metadata(names: Iterable[str], before: Manifest | None) -> bool:
    """Whether a `.metadata` lies in the directory that is not ours."""
    return METADATA in names and metadata_name(before) is None
