"""What is in a file, as far as its own directory, header or pickle tells. Tensors are not read, and no pickle is run."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

from ckpt import _native
from ckpt.directory.sharded_files import METADATA
from ckpt.errors import CorruptError, StorageError
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
_LARGEST_HEADER = 100 << 20  # of a safetensors file, as its own library has it
_LARGEST_PICKLE = 1 << 31
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"},
    **{"I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64"},
}


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
    """

    format: str
    bytes: int
    leaves: list[Leaf] = dataclasses.field(default_factory=list)
    cut: bool = False
    foreign: list[str] = dataclasses.field(default_factory=list)
    checksummed: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)


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
    if start.startswith(b"PK"):
        return _of_zip(path, size)
    if start.startswith(_OLD_MAGIC):
        return _of_old(path, size)
    if is_safetensors(start, size):
        return _of_safetensors(path, size)
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
    records, file = read_records(path, {"data.pkl", "byteorder"})
    if "data.pkl" not in records:
        raise CorruptError(f"'{path}' is a zip file, but holds no data.pkl: it is no torch file")
    made = _described(TORCH_ZIP, size, records["data.pkl"], path)
    made.checksummed = file.checksummed
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


def is_safetensors(start: bytes, size: int) -> bool:
    if len(start) < 9 or size < 10:
        return False
    (length,) = struct.unpack_from("<Q", start)
    return start[8:9] == b"{" and length <= min(size - 8, _LARGEST_HEADER)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Of a safetensors file: what it says of its tensors, and where their bytes begin.

    Raises:
        CorruptError: it is none.
        StorageError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER + 1
            content = file.read(length) if length <= _LARGEST_HEADER else b""
            header = json.loads(content)
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"'{path}' has no header of a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CorruptError(f"'{path}' has no header of a safetensors file")
    return header, 8 + length


def _of_safetensors(path: Path, size: int) -> Contents:
    header, begin = read_header(path)
    notes = [f"{key}: {value}" for key, value in (header.pop("__metadata__", None) or {}).items()]
    leaves = []
    ends = [0]
    for name, said in header.items():
        try:
            dtype = _DTYPES.get(said["dtype"], str(said["dtype"]).lower())
            shape = tuple(int(each) for each in said["shape"])
            first, last = said["data_offsets"]
            if not 0 <= first <= last <= size - begin:
                raise ValueError(f"it lies at {first} to {last}, and the file has {size - begin} bytes for tensors")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"'{path}': tensor '{name}' cannot be there: {error}") from error
        leaves.append(Leaf(name, "tensor", dtype, shape, last - first))
        ends.append(last)
    if begin + max(ends) != size:
        raise CorruptError(f"'{path}' has {size} bytes, its header speaks of {begin + max(ends)}: it was cut off, or added to")
    return Contents(SAFETENSORS, size, leaves, notes=notes)
