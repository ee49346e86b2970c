"""The tensors of a checkpoint or a file, each read when it is asked for, whatever the format."""

from __future__ import annotations

import ctypes
import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt.directory.sharded_files import METADATA, checksums_path, metadata_name
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError, StorageError
from ckpt.loading.archive import TIMEOUT_S, Archive
from ckpt.loading.load import is_zip, load
from ckpt.loading.selection import unfold
from ckpt.loading.skeleton import Skeleton, view_of
from ckpt.loading.tensor_files import TensorFiles, is_tensor_file, view_as
from ckpt.restore.verified_file import VerifiedFile
from ckpt.storage import durable
from ckpt.upkeep import dcp_metadata
from ckpt.upkeep.census import none_at
from ckpt.upkeep.showing import place_of

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

    Raises:
        CheckpointError: it holds objects that loading of weights alone refuses.
    """

    def __init__(self, path: Path) -> None:
        if not is_zip(path):
            self._skeleton, value = None, load(path)
        else:
            self._skeleton = Skeleton(Archive(path, TIMEOUT_S), True)
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
    """What torch.distributed.checkpoint reads: `.metadata`, and files of all ranks. One part is in memory beside a tensor."""

    def __init__(self, directory: Path, metadata: str = METADATA) -> None:
        self._directory = directory
        try:
            layout = dcp_metadata.parse((directory / metadata).read_bytes())
        except OSError as error:
            raise StorageError(error.errno or 0, f"cannot read '{directory / metadata}': {error.strerror}") from error
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
            return torch.load(inside, map_location="cpu", weights_only=True)  # type: ignore[arg-type]  # reads as a file does
        except Exception as error:
            if isinstance(inside.failure, CheckpointError):
                raise inside.failure from None
            if inside.failure is not None:
                raise StorageError(inside.failure.errno or 0, f"cannot read '{path}': {inside.failure}", str(path)) from error
            raise CheckpointError(f"what lies at byte {part.at} of '{path}' cannot be loaded: {error}") from error

    def _file(self, name: str) -> io.RawIOBase:
        if name not in self._files:
            path = self._directory / name
            try:
                self._files[name] = VerifiedFile(path) if checksums_path(path).exists() else open(path, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
        return self._files[name]


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


class _Joined:
    """Several that have no name in common."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.entries: dict[str, Entry] = {}
        self._owners: dict[str, Source] = {}
        for label, source in sources.items():
            for name, entry in source.entries.items():
                if name in self.entries:
                    raise CheckpointError(f"'{name}' is in '{label}' and in another file of the checkpoint: name one file")
                self.entries[name], self._owners[name] = entry, source

    def tensor(self, name: str) -> torch.Tensor:
        return self._owners[name].tensor(name)

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for owner, some in itertools.groupby(names, self._owners.__getitem__):
            found |= owner.tensors([*some])
        return found

    def pieces(self, name: str) -> list[Piece]:
        return self._owners[name].pieces(name)

    def value(self, name: str) -> Any:
        return self._owners[name].value(name)


def open_source(path: Path, file: str = "", rank: int | None = None) -> Source:
    """
    Args:
        path: a checkpoint, a file, or a directory of torch.distributed.checkpoint.
        file: one of the checkpoint alone.
        rank: whose own file is taken, beside what is the same on all ranks, and what is sharded.

    Raises:
        NotACheckpointError: there is nothing of the kind.
        CheckpointError: it cannot be read in this way; says why.
    """
    if not path.is_dir():
        return _of_file(path)
    if not os.path.lexists(path / manifests.NAME):
        if file:
            if not os.path.lexists(path / file):
                raise NotACheckpointError(f"'{path}' holds no file '{file}'")
            return _of_file(path / file)
        if not os.path.lexists(path / METADATA):
            raise none_at(path, "no checkpoint")
        return ShardedSource(path)
    manifest = manifests.read(path)
    if file:
        entry = next((each for each in manifest.files if each.name == file), None)
        if entry is None:
            raise NotACheckpointError(f"'{path}' holds no file '{file}'")
        return _of_file(place_of(path, entry))
    own = [each for each in manifest.files if each.kind == RANK]
    common = [each for each in manifest.files if each.kind == REPLICATED]
    metadata = metadata_name(manifest)
    if rank is not None:
        own = [each for each in own if each.rank == rank]
        if not own:
            raise NotACheckpointError(f"'{path}' holds no file of rank {rank}")
    elif _is_beside_others(manifest, own):
        own = []
    if len(own) > 1:
        names = ", ".join(each.name for each in own[:4]) + (", ..." if len(own) > 4 else "")
        how = f"name one, as in '{path}:{own[0].name}'"
        how += ", or a rank by --rank" * (len({each.rank for each in own}) == len(own))
        raise CheckpointError(f"'{path}' holds {len(own)} files of ranks, which are not put together ({names}): {how}")
    sources: dict[str, Source] = {each.name: _of_file(place_of(path, each)) for each in [*common, *own]}
    if metadata is not None:
        sources[METADATA] = ShardedSource(path, metadata)
    return next(iter(sources.values())) if len(sources) == 1 else _Joined(sources)


def left_out(path: Path, file: str = "", rank: int | None = None) -> list[str]:
    """Names of files that ranks have saved for themselves, and open_source() does not read."""
    if file or not os.path.lexists(path / manifests.NAME):
        return []
    manifest = manifests.read(path)
    own = [each for each in manifest.files if each.kind == RANK]
    if rank is None:
        return [each.name for each in own] if _is_beside_others(manifest, own) else []
    return [each.name for each in own if each.rank != rank]


def _is_beside_others(manifest: Manifest, own: Sequence[FileEntry]) -> bool:
    """Whether what ranks have for themselves may be left out: there is something that is of all of them."""
    is_common = any(each.kind == REPLICATED for each in manifest.files)
    return len(own) > 1 and (is_common or metadata_name(manifest) is not None)


def _of_file(path: Path) -> Source:
    durable.refuse_irregular(path, "read")
    return SafetensorsSource(path) if is_tensor_file(path) else ZipSource(path)
