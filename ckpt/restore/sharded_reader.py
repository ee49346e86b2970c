"""Reads a sharded checkpoint into the state of this rank: only the bytes that it needs, each of them verified."""

from __future__ import annotations

import functools
import io
import os
import pickle
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from ckpt import _native
from ckpt.directory import sharded_files
from ckpt.directory.manifest import SHARDED_METADATA, FileEntry, Manifest
from ckpt.directory.sharded_files import PieceChecksums
from ckpt.errors import CheckpointError, CorruptError, MismatchError, StorageError
from ckpt.loading.archive import reader_threads
from ckpt.restore.places import StepPlaces
from ckpt.sharded.entries import EntryFinder, is_stateful
from ckpt.sharded.resharding import ONLY_HERE, ONLY_THERE, FileReads, ReadPlan, differences, ranges_to_read

_SHOWN = 8  # differences that a message names


class ShardedReader:
    """Of one checkpoint. Making one reads its metadata, and compares that with the target; it writes to nothing.

    Args:
        target: a state dict as it was given to save(), of any mesh and placements; or what gives one, called with shape and
            dtype of each tensor by its key, and None for each value.
        finder: of this rank.

    Attributes:
        refusal: why it cannot be loaded as asked, though it may be good. Then only check() may be called.
        bytes_read: by fill(), of data files.

    Raises:
        CorruptError, StorageError: it is damaged, or cannot be read.
        TypeError, ValueError: the target is nothing that could have been saved.
    """

    def __init__(
        self, places: StepPlaces, manifest: Manifest, target: Any, finder: EntryFinder, *, strict: bool, weights_only: bool,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self._places, self._timeout_s = places, timeout_s
        self._files = {file.name: file for file in manifest.files}
        self._checksums: dict[str, PieceChecksums] = {}
        self.refusal: CheckpointError | None = None
        self.bytes_read = 0
        metadata_file = next((file for file in manifest.files if file.kind == SHARDED_METADATA), None)
        if metadata_file is None:
            self.refusal = CheckpointError(f"'{places}' has nothing for sharded_into=: no sharded state was saved in it")
            return
        metadata = _unpickle(places.path_of(metadata_file.name), self._small(metadata_file))
        by_hand = not callable(target)
        if callable(target):
            target = target(_forms(metadata))
        if not isinstance(target, MutableMapping):
            raise TypeError(f"sharded_into= takes a state dict (nested dicts and lists), not a {type(target).__name__}")
        self._stateful = {key: value for key, value in target.items() if is_stateful(value)}
        self._state = {key: value.state_dict() if key in self._stateful else value for key, value in target.items()}
        self._target = target
        entries, self._paths = finder.find(self._state)
        problems = differences(metadata, entries, strict)
        if problems:
            text = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")
            text += _what_may_help(problems, by_hand)
            self.refusal = MismatchError(f"'{places}' does not fit sharded_into=: {text}", problems)
            return
        self._plan = ReadPlan(metadata, self._payload_of, weights_only)
        self._tensors = []
        for key, entry in entries.items():
            if key not in metadata.state_dict_metadata:
                continue
            if entry.shape is None:
                _expect_place(key, self._state, self._paths[key])
                self._plan.add_value(key)
            else:
                self._plan.add_tensor(key, entry)
                self._tensors.append(entry.value)

    def fill(self) -> None:
        """Reads all, and checks every byte that it uses.

        Raises:
            CorruptError, StorageError, DeadlineError: something of it is damaged, or cannot be read.
            CheckpointError: weights_only refuses a value.
        """
        for tensor in self._tensors:  # also if reading fails: then there are parts of the file
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        with torch.no_grad():
            for name, reads in self._plan.files.items():
                self._read(name, reads)
                for finish in reads.finish:
                    _finish(finish, self._places.path_of(name))
            self._plan.files.clear()

    def take(self) -> Any:
        """Local: puts values to their places, once the checkpoint has been chosen. Returns the target."""
        for key, value in self._plan.values.items():
            _put(self._state, self._paths[key], value)
        for key, value in self._state.items():
            if key in self._stateful:
                self._stateful[key].load_state_dict(value)
            elif self._target[key] is not value:
                self._target[key] = value
        return self._target

    # ---- files -----------------------------------------------------------------------------------------------------

    def _read(self, name: str, reads: FileReads) -> None:
        checksums = self._checksums_of(name)
        ranges, pieces = ranges_to_read(reads.destinations, checksums.piece_bytes, checksums.file_bytes)
        if not ranges:
            return
        self._places.limit(name, _joined(ranges))

        def read(path: Path) -> None:
            self._read_ranges(path, reads, checksums, ranges, pieces)

        self._places.read(name, read)

    def _read_ranges(
        self,
        path: Path,
        reads: FileReads,
        checksums: PieceChecksums,
        ranges: list[tuple[int, int, int]],
        pieces: list[tuple[int, int]],
    ) -> None:
        # What other ranks want of the file, too, they find in the page cache, if they are on this node.
        alone = len(pieces) == len(checksums.crc32s)
        size, crcs, read = _native.read_file_ranges(
            os.fsencode(path), ranges, direct=alone, threads=reader_threads(), timeout_s=self._timeout_s, keep=reads.keep
        )
        self.bytes_read += read
        if size != checksums.file_bytes:
            raise CorruptError(f"'{path}' has {size} bytes; its checksums are of {checksums.file_bytes}")
        at = 0
        for piece, count in pieces:
            crc = 0
            for number in range(at, at + count):
                crc = _native.crc32_combine(crc, crcs[number], ranges[number][1])
            at += count
            if crc != checksums.crc32s[piece]:
                begin = piece * checksums.piece_bytes
                error = CorruptError(f"'{path}' fails a CRC-32: of its bytes from {begin} on some have changed")
                error.bytes_at = begin, min(begin + checksums.piece_bytes, size)
                raise error

    def _payload_of(self, name: str, offset: int) -> int | None:
        return self._checksums_of(name).payloads.get(offset)

    def _checksums_of(self, name: str) -> PieceChecksums:
        found = self._checksums.get(name)
        if found is None:
            data = self._files.get(name)
            file = self._files.get(sharded_files.checksums_path(Path(name)).name)
            if data is None or file is None:
                raise CorruptError(f"'{self._places.path_of(name)}' is named by the metadata, but not by the manifest")
            found = self._checksums[name] = PieceChecksums.parse(self._small(file))
            if found.file_bytes != data.bytes:
                raise CorruptError(f"the checksums of '{self._places.path_of(name)}' are those of another file")
        return found

    def _small(self, file: FileEntry) -> bytes:
        return self._places.read(file.name, functools.partial(_content_of, file))


def _what_may_help(problems: list[str], by_hand: bool) -> str:
    """
    Args:
        by_hand: the target is a state dict. Else it was made for what was saved.
    """
    of_one_side = [problem.endswith((ONLY_HERE, ONLY_THERE)) for problem in problems]
    text = " (strict=False passes over keys that only one side has)" if all(of_one_side) else ""
    if by_hand and any(of_one_side):
        text += (
            ". get_state_dict() of torch.distributed.checkpoint.state_dict gives the same keys to save and to restore, also of "
            "an optimizer that has not stepped yet"
        )
    return text


def _content_of(file: FileEntry, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
    if (len(content), _native.crc32(content)) != (file.bytes, file.crc32):
        raise CorruptError(f"'{path}' is not what its manifest says: its bytes have changed")
    return content


def _joined(ranges: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(begin, end) of what is to be read, as few as possible."""
    joined: list[tuple[int, int]] = []
    for offset, length, _ in ranges:
        if joined and joined[-1][1] == offset:
            joined[-1] = joined[-1][0], offset + length
        else:
            joined.append((offset, offset + length))
    return joined


def _forms(metadata: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    saved = metadata.state_dict_metadata.items()
    return {key: (tuple(each.size), each.properties.dtype) if hasattr(each, "size") else None for key, each in saved}


# What torch puts into `.metadata`, beside dtypes and layouts.
_METADATA = (
    *("Metadata", "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex"),
    *("StorageMeta", "_MEM_FORMAT_ENCODING"),
)
_CLASSES = {("torch.distributed.checkpoint.metadata", name) for name in _METADATA} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Imports and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, (torch.dtype, torch.layout)):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _unpickle(path: Path, content: bytes) -> Any:
    import torch.distributed.checkpoint.filesystem
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        found = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        raise CheckpointError(
            f"'{path}' cannot be read by torch {torch.__version__}: {error}. Was it written by a newer one? See "
            "Options.metadata_compat"
        ) from error
    if not isinstance(found, Metadata):
        raise CorruptError(f"'{path}' is no metadata of torch.distributed.checkpoint")
    return found


def _finish(finish: Any, path: Path) -> None:
    try:
        finish()
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"'{path}' holds a value that weights_only=True refuses: {error}") from error


def _put(state: Any, path: tuple[Any, ...], value: Any) -> None:
    """Where torch has found it: keys are texts in the path, whatever they are."""
    _container_of(state, path)[_key_of(_container_of(state, path), path[-1])] = value


def _expect_place(key: str, state: Any, path: tuple[Any, ...]) -> None:
    container = _container_of(state, path)
    if not isinstance(container, (MutableMapping, list)):
        raise TypeError(f"'{key}' of sharded_into= lies in a {type(container).__name__}, which takes no other values")


def _container_of(state: Any, path: tuple[Any, ...]) -> Any:
    for step in path[:-1]:
        state = state[_key_of(state, step)]
    return state


def _key_of(container: Any, step: Any) -> Any:
    if isinstance(container, Mapping) and step not in container:
        return next(key for key in container if str(key) == step)
    return step
