"""The tensors of a checkpoint or a file, each read when it is asked for, whatever the format."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ckpt import _native
from ckpt.directory.dcp_directory import is_sealed
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.sharded_files import METADATA, checksums_path
from ckpt.directory.step_names import is_step_name
from ckpt.errors import CheckpointError, CorruptError, StorageError
from ckpt.loading.archive import TIMEOUT_S, Archive
from ckpt.loading.load import is_zip, load
from ckpt.loading.selection import unfold
from ckpt.loading.skeleton import Skeleton, view_of
from ckpt.loading.step_directory import compare
from ckpt.loading.tensor_files import TensorFiles, view_as
from ckpt.restore.verified_file import VerifiedFile
from ckpt.upkeep import dcp_metadata
from ckpt.upkeep.zip_check import first_bad_record

Path_ = tuple[Any, ...]  # keys and positions
_DEEPEST = 100
_BATCH_BYTES = 4 << 20
_MOST_IN_BATCH = 1000


class Position(int):
    """In a list; any other number in a path is a key."""


class TuplePosition(Position):
    """In a tuple."""


class Entry(NamedTuple):
    """A tensor or value. `shape` is None for what is no tensor."""

    path: Path_
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        return 0 if self.dtype is None or self.shape is None else math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """A box of a tensor that lies in one place. `read`: its elements; raises as Source.tensor()."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class Source(Protocol):
    """
    Attributes:
        entries: by dotted name.
    """

    entries: dict[str, Entry]

    def tensor(self, name: str) -> torch.Tensor:
        """
        Raises:
            CorruptError: its bytes have changed, as far as that can be told.
        """

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Several small ones at once, which takes less time."""

    def pieces(self, name: str) -> list[Piece]:
        """Of a tensor, as they lie there: together all of it."""

    def value(self, name: str) -> Any:
        """What is no tensor."""


def batches(entries: Mapping[str, Entry], names: Iterable[str]) -> Iterator[list[str]]:
    """As many at once as take little memory; a large one alone."""
    batch: list[str] = []
    size = 0
    for name in names:
        nbytes = entries[name].nbytes
        if batch and (size + nbytes > _BATCH_BYTES or len(batch) == _MOST_IN_BATCH):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += nbytes
    if batch:
        yield batch


def _one_by_one(source: Source, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: source.tensor(name) for name in names}


def _in_one(source: Source, name: str) -> list[Piece]:
    shape = source.entries[name].shape
    assert shape is not None
    return [Piece((0,) * len(shape), shape, lambda: source.tensor(name))]


def dotted(path: Path_) -> str:
    return ".".join(map(str, path))


class ZipSource:
    """A torch file. Every record is verified when it is read.

    Args:
        expected: what a manifest says of it.

    Raises:
        CorruptError: it is another one than the manifest says.
        CheckpointError: it holds objects that loading of weights alone refuses.
    """

    def __init__(self, path: Path, expected: FileEntry | None = None) -> None:
        if not is_zip(path):
            self._skeleton, value = None, load(path)
        else:
            archive = Archive(path, TIMEOUT_S)
            if expected is not None:
                compare(path, expected, archive.size, archive.claimed_crc32())
            self._skeleton = Skeleton(archive, True)
            value = self._skeleton.value
        self._path = path
        self._found: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        for own_path, part in walk(value):
            name = dotted(own_path)
            if name in self.entries:
                raise CheckpointError(f"'{path}' holds two things that are both called '{name}'")
            is_tensor = isinstance(part, torch.Tensor)
            self.entries[name] = Entry(own_path, part.dtype, tuple(part.shape)) if is_tensor else Entry(own_path, None, None)
            self._found[name] = part

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors([name])[name]

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        if self._skeleton is None:
            return {name: self._found[name].detach() for name in names}
        records = {name: self._record_of(self._skeleton, name) for name in names}
        places = self._skeleton.archive.allocate({*records.values()})
        self._skeleton.archive.fill(places)
        return {name: view_of(self._found[name], places[record]) for name, record in records.items()}

    def _record_of(self, skeleton: Skeleton, name: str) -> str:
        found = self._found[name]
        record = skeleton.record_of(found.detach() if type(found) is torch.nn.Parameter else found)
        if record is None:
            raise CheckpointError(f"'{name}' in '{self._path}' is no plain tensor: {found.layout}, {type(found).__name__}")
        return record

    def pieces(self, name: str) -> list[Piece]:
        return _in_one(self, name)

    def value(self, name: str) -> Any:
        return self._found[name]


def walk(value: Any) -> Iterator[tuple[Path_, Any]]:
    """Of containers only those that hold nothing."""
    waiting: list[tuple[Path_, Any]] = [((), value)]
    while waiting:
        path, part = waiting.pop()
        parts = unfold(part)
        if not parts:
            yield path, part
            continue
        if len(path) > _DEEPEST:
            raise CheckpointError(f"'{dotted(path)}' lies deeper than {_DEEPEST} containers, or in itself")
        kind = TuplePosition if isinstance(part, tuple) else Position if isinstance(part, list) else None
        keys = (key if kind is None else kind(key) for key, _ in parts)
        waiting += [((*path, key), below) for key, (_, below) in reversed([*zip(keys, parts, strict=True)])]


class ShardedSource:
    """What torch.distributed.checkpoint reads: `.metadata`, and files of all ranks. One part is in memory beside a tensor.

    Args:
        manifest: that names these; None: whatever checksums there are have to do.
    """

    def __init__(self, directory: Path, metadata: str = METADATA, manifest: Manifest | None = None) -> None:
        self._directory = directory
        self._named = {} if manifest is None else {file.name: file for file in manifest.files}
        content = _content_of(directory / metadata)
        entry = self._named.get(metadata)
        if entry is not None and not _is_as_written(content, entry):
            if is_sealed(content) or is_step_name(directory.name):
                raise CorruptError(f"'{directory / metadata}' fails the CRC-32 of its manifest: it is that of another save")
            self._named = {}  # torch has saved there since, and knows no manifest
        layout = dcp_metadata.parse(content)
        self._is_sealed = layout.is_sealed
        self._stored = {each.key: each for each in layout.stored}
        self._files: dict[str, io.RawIOBase] = {}
        self.entries = {each.key: _entry(each) for each in layout.stored}

    def tensor(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        assert entry.shape is not None
        pieces = self.pieces(name)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for piece in pieces:
            target = whole
            for dimension, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                target = target.narrow(dimension, offset, size)
            target.copy_(piece.read())
        return whole

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return _one_by_one(self, names)

    def pieces(self, name: str) -> list[Piece]:
        shape, parts = self.entries[name].shape, self._stored[name].parts
        assert shape is not None
        boxes = [tuple(zip(part.offsets, part.sizes, shape, strict=True)) for part in parts if _has_box(part, shape)]
        lie_inside = all(offset + size <= whole for box in boxes for offset, size, whole in box)
        total = sum(math.prod(size for _, size, _ in box) for box in boxes)
        if len(boxes) < len(parts) or not boxes or not lie_inside or total != math.prod(shape):
            raise CorruptError(f"'{self._directory}' does not hold all of '{name}', or parts that are not of it")
        return [Piece(part.offsets, part.sizes, functools.partial(self._read_tensor, name, part)) for part in parts]

    def _read_tensor(self, name: str, part: dcp_metadata.Part) -> torch.Tensor:
        found = self._read(part)
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != part.sizes:
            raise CorruptError(f"'{self._directory / part.file}' holds something else at byte {part.at} than '{name}'")
        return found

    def value(self, name: str) -> Any:
        parts = self._stored[name].parts
        if not parts:
            raise CorruptError(f"'{self._directory}' does not say where '{name}' is")
        return self._read(parts[0])

    def _read(self, part: dcp_metadata.Part) -> Any:
        path = self._directory / part.file
        file = self._file(part.file)
        if file.seek(0, os.SEEK_END) < part.at + part.length:
            raise CorruptError(f"'{path}' ends before byte {part.at + part.length}")
        inside = _Slice(file, part.at, part.length)
        try:
            if not isinstance(file, VerifiedFile):
                _verify_archive(inside, part)
            return torch.load(inside, map_location="cpu", weights_only=True)  # type: ignore[arg-type]  # reads as a file does
        except Exception as error:
            if isinstance(inside.failure, CheckpointError):
                raise inside.failure from None
            if inside.failure is not None:
                raise StorageError(inside.failure.errno or 0, f"cannot read '{path}': {inside.failure}", str(path)) from error
            if isinstance(error, _BadRecordError):
                raise CorruptError(f"'{path}' is damaged: what lies at byte {part.at} {error}") from None
            raise CheckpointError(f"what lies at byte {part.at} of '{path}' cannot be loaded: {error}") from error

    def _file(self, name: str) -> io.RawIOBase:
        if name not in self._files:
            path = self._directory / name
            try:
                self._files[name] = VerifiedFile(path) if self._has_checksums(path) else open(path, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
        return self._files[name]

    def _has_checksums(self, path: Path) -> bool:
        """Those that the manifest names; what torch has written since has none, whatever lies beside it.

        Raises:
            CorruptError: they are gone, or those of another save.
        """
        beside = checksums_path(path)
        entry = self._named.get(beside.name)
        if entry is None:
            return self._is_sealed and beside.exists()
        if beside.exists() and not _is_as_written(_content_of(beside), entry):
            raise CorruptError(f"'{beside}' fails the CRC-32 of its manifest: '{path}' cannot be verified")
        return True


def _content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error


def _is_as_written(content: bytes, entry: FileEntry) -> bool:
    return (len(content), _native.crc32(content)) == (entry.bytes, entry.crc32)


class _BadRecordError(Exception):
    """Which record of an archive fails its CRC-32."""


def _verify_archive(inside: _Slice, part: dcp_metadata.Part) -> None:
    """By its own checksums, which torch does not look at. What has none, or is no archive, is torch's to judge.

    Raises:
        _BadRecordError: a record has changed.
    """
    with contextlib.suppress(zipfile.BadZipFile, EOFError, NotImplementedError, ValueError):
        if part.length > _BATCH_BYTES or first_bad_record(inside.read(part.length)) is not None:
            with zipfile.ZipFile(inside) as archive:
                bad = archive.testzip() if any(each.CRC for each in archive.infolist()) else None
            if bad is not None:
                raise _BadRecordError(f"fails the CRC-32 of its record '{bad}'")
    inside.seek(0)


class _Slice(io.RawIOBase):
    """A part of a file, as a file: so that nothing of it is in memory but what is read of it.

    Attributes:
        failure: the first error of a read, which torch may answer by one of its own.
    """

    def __init__(self, file: io.RawIOBase, begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length = file, begin, length
        self._at = 0
        self.failure: CheckpointError | OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """All that was asked for, but at the end."""
        wanted = memoryview(buffer).cast("B")
        wanted = wanted[: max(0, self._length - self._at)]
        done = 0
        try:
            self._file.seek(self._begin + self._at)
            while done < len(wanted) and (count := self._file.readinto(wanted[done:])):
                done += count
        except (CheckpointError, OSError) as error:
            self.failure = self.failure or error
            raise
        self._at += done
        return done


def _has_box(part: dcp_metadata.Part, shape: tuple[int, ...]) -> bool:
    return len(part.offsets) == len(part.sizes) == len(shape)


def _entry(stored: dcp_metadata.Stored) -> Entry:
    """Keys of dicts are texts there."""
    path = tuple(Position(key) if isinstance(key, int) else key for key in stored.path)
    return Entry(path, None, None) if stored.shape is None else Entry(path, _dtype(stored.dtype), stored.shape)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"this torch has no dtype {name!r}")
    return found


class SafetensorsSource:
    """A safetensors file; or those that an index names. They have no checksums: nothing but a manifest beside one tells damage.

    Raises:
        CorruptError: a header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._files = TensorFiles(path, TIMEOUT_S)
        self.entries = {name: Entry((name,), each.dtype, each.shape) for name, each in self._files.tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors([name])[name]

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        places = self._files.allocate(names)
        self._files.fill(places)
        return {name: view_as(place, self._files.tensors[name]) for name, place in places.items()}

    def pieces(self, name: str) -> list[Piece]:
        return _in_one(self, name)

    def value(self, name: str) -> Any:
        raise KeyError(name)


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """Its own memory; it is contiguous, and on the host."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
