"""What is in a file, as far as its own directory, header or pickle tells. Tensors are not read, and no pickle is run."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
from pathlib import Path
from typing import Any

from ckpt import _native
from ckpt.directory.frozen_files import RECORD, FrozenReference
from ckpt.directory.sharded_files import METADATA
from ckpt.errors import CorruptError, StorageError
from ckpt.safetensors_layout import KINDS, LENGTH_BYTES, length_of, parse
from ckpt.storage import durable
from ckpt.upkeep import dcp_metadata
from ckpt.upkeep.described import Leaf, describe
from ckpt.upkeep.pickles import read_pickle

TORCH_ZIP, TORCH_OLD, SAFETENSORS, PICKLE, METADATA_OF_DCP, PART_OF_DCP, UNKNOWN = (
    *("torch", "torch before 1.6", "safetensors", "pickle", "metadata of torch.distributed.checkpoint"),
    *("part of a sharded checkpoint", "unknown"),
)
_THREADS = 4
_TIMEOUT_S = 1800.0
_OLD_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_LARGEST_PICKLE = 1 << 31


@dataclasses.dataclass
class Contents:
    """
    Attributes:
        format: one of the above.
        bytes: of the file.
        leaves: tensors and values.
        cut: whether there are more than anybody would look at.
        foreign: see described.Tree.
        checksummed: whether it carries checksums of its own.
        notes: what else is worth knowing.
        beside: the name of the file that has its frozen tensors, if there is one.
    """

    format: str
    bytes: int
    leaves: list[Leaf] = dataclasses.field(default_factory=list)
    cut: bool = False
    foreign: list[str] = dataclasses.field(default_factory=list)
    checksummed: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    beside: str = ""


def read_contents(path: Path) -> Contents:
    """
    Raises:
        CorruptError: it is damaged, or of no format that is known.
        StorageError: it cannot be read.
    """
    durable.refuse_irregular(path, "show")
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        size = os.stat(path).st_size
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
    if path.name == METADATA or path.name.startswith(f"{METADATA}-"):
        return _of_metadata(path, size)
    if path.suffix == ".distcp":
        return Contents(PART_OF_DCP, size, notes=[f"what is in it, {METADATA} beside it says: show '{path.parent}'"])
    if is_safetensors(path, start, size):  # first: what the others begin with may be the length of a header
        return _of_safetensors(path, size)
    if start.startswith(b"PK"):
        return _of_zip(path, size)
    if start.startswith(_OLD_MAGIC):
        return _of_old(path, size)
    if start.startswith(b"\x80"):
        return _of_pickle(path, size)
    raise CorruptError(f"'{path}' is no torch file, no safetensors file and no pickle, or its beginning is damaged")


# ---- torch -----------------------------------------------------------------------------------------------------------


def read_records(path: Path, names: set[str]) -> tuple[dict[str, bytes], Any]:
    """Records of a torch file by their names without that of the archive, verified; and the native file.

    Raises:
        CorruptError: it is damaged.
    """
    file = _native.RecordFile(os.fsencode(path), False, _THREADS, _TIMEOUT_S)
    wanted = {}
    for number, (name, _, size) in enumerate(file.records):
        short = name.partition("/")[2]
        if short in names and short not in wanted:
            if size > _LARGEST_PICKLE:
                raise CorruptError(f"record '{name}' of '{path}' has {size} bytes, which is no size for a description")
            wanted[short] = (number, bytearray(max(size, 1)), size)
    places = [(number, ctypes.addressof(ctypes.c_char.from_buffer(room)), -1) for number, room, _ in wanted.values()]
    file.read(places, whole=False, threads=_THREADS, timeout_s=_TIMEOUT_S, keep=list(wanted.values()))
    return {name: bytes(room[:size]) for name, (_, room, size) in wanted.items()}, file


def _of_zip(path: Path, size: int) -> Contents:
    records, file = read_records(path, {"data.pkl", "byteorder", RECORD})
    if "data.pkl" not in records:
        raise CorruptError(f"'{path}' is a zip file, but holds no data.pkl: it is no torch file")
    made = _described(TORCH_ZIP, size, records["data.pkl"], path)
    made.checksummed = file.checksummed
    if RECORD in records:
        made.beside = FrozenReference.parse(records[RECORD]).file
        made.notes.append(f"its frozen tensors are in '{made.beside}', beside it")
    if records.get("byteorder", b"little") != b"little":
        made.notes.append("its numbers are big-endian")
    if any(name.endswith("/constants.pkl") for name, _, _ in file.records):
        made.notes.append("it is a TorchScript archive, which is a program")
    return made


def _described(kind: str, size: int, content: Any, path: Path, at: int = 0) -> Contents:
    try:
        tree = describe(read_pickle(content, at)[0])
    except CorruptError as error:
        raise CorruptError(f"'{path}': {error}") from None
    return Contents(kind, size, tree.leaves, tree.cut, tree.foreign)


def _of_old(path: Path, size: int) -> Contents:
    """Four pickles, one behind the other: a magic number, a version, what the system was, the object."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = 0
        try:
            for _ in range(3):
                at = read_pickle(content, at)[1]
        except CorruptError as error:
            raise CorruptError(f"'{path}': {error}") from None
        return _described(TORCH_OLD, size, content, path, at)


def _of_pickle(path: Path, size: int) -> Contents:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _described(PICKLE, size, content, path)


def _of_metadata(path: Path, size: int) -> Contents:
    if size > _LARGEST_PICKLE:
        raise CorruptError(f"'{path}' has {size} bytes, which is no size for metadata")
    try:
        layout = dcp_metadata.parse(path.read_bytes())
    except CorruptError as error:
        raise CorruptError(f"'{path}': {error}") from None
    made = Contents(METADATA_OF_DCP, size, layout.leaves(), checksummed=layout.is_sealed)
    made.notes.append(f"in {', '.join(layout.file_names[:4])}{', ...' if len(layout.file_names) > 4 else ''}")
    return made


# ---- safetensors -----------------------------------------------------------------------------------------------------


def is_safetensors(path: Path, start: bytes, size: int) -> bool:
    """By its beginning; or by its name, so that one whose beginning is damaged is not taken for something else.

    Args:
        start: of the file, LENGTH_BYTES and one more; size: of all of it.
    """
    try:
        length_of(start[:LENGTH_BYTES], size)
    except ValueError:
        return path.suffix == ".safetensors"
    return path.suffix == ".safetensors" or start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"


def _of_safetensors(path: Path, size: int) -> Contents:
    try:
        with open(path, "rb") as file:
            text = file.read(length_of(file.read(LENGTH_BYTES), size))
        spans, metadata = parse(text, size - LENGTH_BYTES - len(text))
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
    except ValueError as error:
        raise CorruptError(f"'{path}' is no safetensors file, or damaged: {error}") from None
    leaves = [Leaf(each.name, "tensor", KINDS[each.code].name, each.shape, each.end - each.begin) for each in spans]
    return Contents(SAFETENSORS, size, leaves, notes=[f"{key}: {value}" for key, value in metadata.items()])
