"""The bytes of records straight into tensors that are there; for each other tensor through a temporary of its size."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ckpt._archive import Archive, allocate
from ckpt._fit import Pair

_TEMPORARY_BYTES = 64 << 20  # of several small tensors that are read together; a larger one is read alone


class Filling:
    """Tensors of a file, and what gets their elements. ckpt.fence() comes before.

    Args:
        pairs: tensors to fill.
        adopted: memory for whole records, by their names, which is filled too.
    """

    def __init__(self, archive: Archive, pairs: Iterable[Pair], adopted: Mapping[str, torch.UntypedStorage]) -> None:
        self._archive = archive
        self._pairs = list(pairs)
        self._by_record: dict[str, list[Pair]] = {}
        for pair in self._pairs:
            if pair.source.numel():
                self._by_record.setdefault(pair.record, []).append(pair)
        self._direct: dict[str, Any] = dict(adopted)
        taken = Intervals()
        for name, (first, *_) in self._by_record.items():
            if name not in self._direct and takes_whole(first, archive.records[name].size) and taken.add(first.target):
                self._direct[name] = first.target

    def begin(self) -> Mapping[str, Any]:
        """What can be read straight to its place: the records and the places, for Archive.fill()."""
        for pair in self._pairs:  # also if reading fails: then there are parts of the file
            if not pair.target.is_inference():
                torch.autograd.graph.increment_version(pair.target)
        return self._direct

    def finish(self) -> None:
        """All else, after that."""
        with torch.no_grad():
            for name in self._by_record.keys() & self._direct.keys():
                _copy_to_others(self._by_record[name], self._direct[name])
            rest = {name: pairs for name, pairs in self._by_record.items() if name not in self._direct}
            _fill_the_rest(self._archive, rest)


def takes_whole(pair: Pair, nbytes: int) -> bool:
    """Whether the record's bytes, as they are, are those of the target."""
    source, target = pair.source, pair.target
    span = sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True)) + 1
    return (
        target.device.type == "cpu"
        and source.stride() == target.stride()
        and source.storage_offset() == 0
        and source.numel() == span  # dense: no gaps, nothing twice
        and source.nbytes == nbytes
    )


class Intervals:
    """Memory that threads write to: no byte twice."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, tensor: torch.Tensor) -> bool:
        """False if it overlaps with what was added."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = bisect.bisect_right(self._begins, begin)
        if (at and self._ends[at - 1] > begin) or (at < len(self._begins) and self._begins[at] < end):
            return False
        self._begins.insert(at, begin)
        self._ends.insert(at, end)
        return True


def _copy_to_others(pairs: list[Pair], filled: torch.Tensor | torch.UntypedStorage) -> None:
    """What shares the record with a tensor that has got it: from there, unless it shares memory here too."""
    for pair in pairs:
        source = _view(pair.source, filled)
        here = (source.data_ptr(), source.stride()) == (pair.target.data_ptr(), pair.target.stride())
        if not (here and source.device == pair.target.device):
            pair.target.copy_(source)


def _fill_the_rest(archive: Archive, by_record: dict[str, list[Pair]]) -> None:
    batch: dict[str, torch.UntypedStorage] = {}
    held = 0
    for name in by_record:
        record = archive.records[name]
        if batch and held + record.size > _TEMPORARY_BYTES:
            _fill_batch(archive, by_record, batch)
            batch, held = {}, 0
        batch[name] = allocate(record.size, record.offset)
        held += record.size
    _fill_batch(archive, by_record, batch)


def _fill_batch(archive: Archive, by_record: dict[str, list[Pair]], batch: dict[str, torch.UntypedStorage]) -> None:
    archive.fill(batch)
    for name, storage in batch.items():
        for pair in by_record[name]:
            pair.target.copy_(_view(pair.source, storage))


def _view(source: torch.Tensor, filled: torch.Tensor | torch.UntypedStorage) -> torch.Tensor:
    """The tensor that `source` is in the outline, over memory that holds the record."""
    whole, rest = 0, 0
    if isinstance(filled, torch.Tensor):
        whole, rest = divmod(int(filled.storage_offset()) * filled.itemsize, source.itemsize)
    if rest:  # a record of several dtypes, filled into a tensor that stands askew for this one
        assert isinstance(filled, torch.Tensor)
        filled, whole = filled.clone(memory_format=torch.preserve_format), 0
    storage = filled.untyped_storage() if isinstance(filled, torch.Tensor) else filled
    return torch.empty(0, dtype=source.dtype).set_(storage, whole + source.storage_offset(), source.shape, source.stride())
