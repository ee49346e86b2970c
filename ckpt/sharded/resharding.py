"""Which bytes of a sharded checkpoint a tensor here is made of, whatever ranks, meshes and placements have written it.

Nothing else is read. A part that lies in the file as it is to lie in memory is read straight to there; any other goes through a
temporary, and whatever is no contiguous tensor (values, and tensors of other kinds) is unpickled.
"""

from __future__ import annotations

import ctypes
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ckpt.sharded.chunks import Box
from ckpt.sharded.entries import Entry

ONLY_HERE, ONLY_THERE = "is not in the checkpoint", "is only in the checkpoint"


class ByteDestination(NamedTuple):
    """Bytes [begin, end) of a file, and the memory that gets them."""

    begin: int
    end: int
    address: int


class FileReads(NamedTuple):
    """Of one file.

    Attributes:
        destinations: disjoint.
        keep: owns their memory.
        finish: what is to be done when they have their bytes.
    """

    destinations: list[ByteDestination]
    keep: list[Any]
    finish: list[Callable[[], None]]


class _Part(NamedTuple):
    """What of a saved chunk goes to a part of a tensor here."""

    within: tuple[slice, ...]  # the chunk
    target: torch.Tensor


class ReadPlan:
    """
    Args:
        metadata: torch's, of the checkpoint.
        payload_of: where the payload of an archive begins, given the name of its file and its offset; None: it holds no
            contiguous tensor.
        weights_only: as of torch.load, for values.

    Attributes:
        files: what is to be read, by the names of files.
        values: by their keys, once all has been read and finished.
    """

    def __init__(self, metadata: Any, payload_of: Callable[[str, int], int | None], weights_only: bool) -> None:
        self._metadata = metadata
        self._payload_of = payload_of
        self._weights_only = weights_only
        self.files: dict[str, FileReads] = {}
        self.values: dict[str, Any] = {}

    def add_value(self, key: str) -> None:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        info = self._metadata.storage_data[MetadataIndex(key)]

        def finish(memory: torch.Tensor) -> None:
            self.values[key] = torch.load(io.BytesIO(_bytes_of(memory)), weights_only=self._weights_only)

        self._read_archive(info, finish)

    def add_tensor(self, key: str, entry: Entry) -> None:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        saved = self._metadata.state_dict_metadata[key]
        boxes = [box for box in entry.boxes if 0 not in box.sizes]
        for chunk in saved.chunks:
            parts = [part for box in boxes if (part := _overlap(entry.value, box, chunk)) is not None]
            if parts:
                info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                self._read_chunk(info, tuple(chunk.sizes), entry.value.dtype, parts)

    def _read_chunk(self, info: Any, sizes: tuple[int, ...], dtype: torch.dtype, parts: list[_Part]) -> None:
        payload = self._payload_of(info.relative_path, info.offset)
        if payload is None:

            def finish(memory: torch.Tensor) -> None:
                chunk = torch.load(io.BytesIO(_bytes_of(memory)), weights_only=True)
                _copy_parts(chunk, parts)

            return self._read_archive(info, finish)
        extents = [_extent(sizes, part.within) for part in parts]
        first, last = min(low for low, _ in extents), max(high for _, high in extents)
        begin, end = payload + first * dtype.itemsize, payload + last * dtype.itemsize
        reads = self._of_file(info.relative_path)
        target = parts[0].target
        if len(parts) == 1 and _is_plain(target) and target.numel() == last - first:
            reads.destinations.append(ByteDestination(begin, end, target.data_ptr()))
            reads.keep.append(target)
            return None
        memory = torch.empty(last - first, dtype=dtype, device="cpu")
        reads.destinations.append(ByteDestination(begin, end, memory.data_ptr()))
        reads.keep.append(memory)
        strides = _strides(sizes)

        def scatter() -> None:
            for (low, _), part in zip(extents, parts, strict=True):
                shape = [each.stop - each.start for each in part.within]
                part.target.copy_(memory.as_strided(shape, strides, low - first))

        reads.finish.append(scatter)
        return None

    def _read_archive(self, info: Any, finish: Callable[[torch.Tensor], None]) -> None:
        memory = torch.empty(info.length, dtype=torch.uint8, device="cpu")
        reads = self._of_file(info.relative_path)
        reads.destinations.append(ByteDestination(info.offset, info.offset + info.length, memory.data_ptr()))
        reads.keep.append(memory)
        reads.finish.append(lambda: finish(memory))

    def _of_file(self, name: str) -> FileReads:
        return self.files.setdefault(name, FileReads([], [], []))


def ranges_to_read(
    destinations: Iterable[ByteDestination], piece_bytes: int, file_bytes: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Whole pieces, so that each can be verified; each byte once.

    Returns:
        ranges (offset, length, address; 0: of bytes that nobody wants), and for each piece its number and that of its ranges.
    """
    ranges: list[tuple[int, int, int]] = []
    pieces: dict[int, list[ByteDestination]] = {}
    for each in destinations:
        for piece in range(each.begin // piece_bytes, -(-each.end // piece_bytes)):
            pieces.setdefault(piece, []).append(each)
    counts = []
    for piece in sorted(pieces):
        at, end, before = piece * piece_bytes, min((piece + 1) * piece_bytes, file_bytes), len(ranges)
        for each in sorted(pieces[piece]):
            low, high = max(each.begin, at), min(each.end, end)
            if low > at:
                ranges.append((at, low - at, 0))
            ranges.append((low, high - low, each.address + low - each.begin))
            at = high
        if at < end:
            ranges.append((at, end - at, 0))
        counts.append((piece, len(ranges) - before))
    return ranges, counts


def _overlap(local: torch.Tensor, box: Box, chunk: Any) -> _Part | None:
    within, target = [], local
    for dim, (offset, size, begin) in enumerate(zip(box.offsets, box.sizes, box.begin, strict=True)):
        saved, length = chunk.offsets[dim], chunk.sizes[dim]
        low, high = max(offset, saved), min(offset + size, saved + length)
        if low >= high:
            return None
        within.append(slice(low - saved, high - saved))
        target = target.narrow(dim, begin + low - offset, high - low)
    return _Part(tuple(within), target)


def _is_plain(target: torch.Tensor) -> bool:
    """Whether bytes in its memory are its values, as they follow each other."""
    strided = target.layout is torch.strided and target.is_cpu and target.is_contiguous()
    return strided and not target.is_conj() and not target.is_neg() and type(target) is torch.Tensor


def _extent(sizes: Sequence[int], within: Sequence[slice]) -> tuple[int, int]:
    """From the first element to behind the last, in a contiguous tensor."""
    strides = _strides(sizes)
    first = sum(each.start * stride for each, stride in zip(within, strides, strict=True))
    last = sum((each.stop - 1) * stride for each, stride in zip(within, strides, strict=True))
    return first, last + 1


def _strides(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]


def _copy_parts(chunk: torch.Tensor, parts: Sequence[_Part]) -> None:
    for part in parts:
        part.target.copy_(chunk[part.within])


def _bytes_of(memory: torch.Tensor) -> bytes:
    return ctypes.string_at(memory.data_ptr(), memory.nbytes)


def differences(metadata: Any, entries: Mapping[str, Entry], strict: bool) -> list[str]:
    """What keeps the checkpoint from being read into these: a text for each key."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = []
    for key, entry in entries.items():
        saved = metadata.state_dict_metadata.get(key)
        if saved is None:
            found += [f"'{key}' {ONLY_HERE}"] if strict else []
        elif isinstance(saved, TensorStorageMetadata) != (entry.shape is not None):
            kinds = ("a value", "a tensor") if entry.shape is not None else ("a tensor", "a value")
            found.append(f"'{key}' is {kinds[0]} in the checkpoint, and {kinds[1]} here")
        elif entry.shape is not None and (tuple(saved.size), saved.properties.dtype) != (entry.shape, entry.value.dtype):
            theirs, ours = (tuple(saved.size), saved.properties.dtype), (entry.shape, entry.value.dtype)
            found.append(f"'{key}' has shape {theirs[0]} and dtype {theirs[1]} in the checkpoint, {ours[0]} and {ours[1]} here")
    if strict:
        found += [f"'{key}' {ONLY_THERE}" for key in metadata.state_dict_metadata if key not in entries]
    return found
