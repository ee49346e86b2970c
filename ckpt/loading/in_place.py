"""The bytes of records straight into tensors that are there; for each other tensor through a temporary of its size."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

import torch

from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.loading.archive import Archive
from ckpt.loading.host_memory import allocate
from ckpt.loading.record_memory import Memory
from ckpt.loading.skeleton import view_of
from ckpt.loading.target_match import Pair

_TEMPORARY_BYTES = 64 << 20  # of several small tensors that are read together; a larger one is read alone


class Filling:
    """Tensors of a file, and what gets their elements. ckpt.fence() comes before.

    Args:
        pairs: tensors to fill.
        memory: for whole records, which is filled too.
        together: ranks send each other what they read, from host to host. What cannot be read straight to its place is then
            among that, in memory of the host; else it is read afterwards, to temporaries.

    Attributes:
        places, devices: what can be read straight to its place, see Places.
    """

    def __init__(self, archive: Archive, pairs: Iterable[Pair], memory: Memory, together: bool = False) -> None:
        self._archive = archive
        self._pairs = list(pairs)
        self._memory = memory
        self._by_record: dict[str, list[Pair]] = {}
        for pair in self._pairs:
            if pair.source.numel():
                self._by_record.setdefault(pair.record, []).append(pair)
        self._together = together
        self._choose(devices=not together)

    def _choose(self, devices: bool) -> None:
        self.places: dict[str, Any] = dict(self._memory.places)
        self.devices = dict(self._memory.devices)
        taken = Intervals()
        for name, (first, *_) in self._by_record.items():
            direct = name not in self.places and takes_whole(first, self._archive.records[name].size, devices)
            if direct and taken.add(first.target):
                self.places[name] = first.target
                if (device := torch_devices.holding(first.target)) != HOST:
                    self.devices[name] = device
        if self._together:
            self.places |= self._archive.allocate([name for name in self._by_record if name not in self.places])

    def retreat(self) -> None:
        self._memory.retreat()
        self._choose(devices=False)

    def begin(self) -> None:
        """Before places are written to."""
        for pair in self._pairs:  # also if reading fails: then there are parts of the file
            if not pair.target.is_inference():
                torch.autograd.graph.increment_version(pair.target)

    def finish(self) -> None:
        """All else, after that."""
        with torch.no_grad():
            for name in self._by_record.keys() & self.places.keys():
                _copy_to_others(self._by_record[name], self.places[name])
            rest = {name: pairs for name, pairs in self._by_record.items() if name not in self.places}
            _fill_the_rest(self._archive, rest)


def takes_whole(pair: Pair, nbytes: int, devices: bool = True) -> bool:
    """Whether the record's bytes, as they are, are those of the target, and can be read to there.

    Args:
        devices: whether devices can be sent bytes.
    """
    source, target = pair.source, pair.target
    within_reach = target.device.type == "cpu" if torch_devices.holding(target) == HOST else devices
    span = sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True)) + 1
    return (
        within_reach
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
        source = view_of(pair.source, filled)
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
            pair.target.copy_(view_of(pair.source, storage))
