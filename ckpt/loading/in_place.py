"""The bytes of records straight into tensors that are there; for each other tensor through a temporary of its size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.loading.archive import Records
from ckpt.loading.host_memory import allocate
from ckpt.loading.overlap import Pair, span, split
from ckpt.loading.record_memory import RecordMemory
from ckpt.loading.skeleton import view_of

_TEMPORARY_BYTES = 64 << 20  # of several small tensors that are read together; a larger one is read alone


class InPlaceRead:
    """Tensors of a file, and what gets their elements. ckpt.fence() comes before.

    Args:
        pairs: tensors to fill.
        memory: for whole records, which is filled too.
        together: ranks send each other what they read, from host to host. What cannot be read straight to its place is then
            among that, in memory of the host; else it is read afterwards, to temporaries.

    Attributes:
        places, devices: what can be read straight to its place, see Places.
    """

    def __init__(self, archive: Records, pairs: Iterable[Pair], memory: RecordMemory, together: bool = False) -> None:
        self._archive = archive
        self._pairs = list(pairs)
        self._memory = memory
        self._by_record: dict[str, list[Pair]] = {}
        free, self._in_order = split([pair for pair in self._pairs if pair.source.numel()])
        for pair in free:
            self._by_record.setdefault(pair.record, []).append(pair)
        self._together = together
        self._choose(devices=not together)

    def _choose(self, devices: bool) -> None:
        self.places: dict[str, Any] = dict(self._memory.places)
        self.devices = dict(self._memory.devices)
        for name, (first, *_) in self._by_record.items():
            if name not in self.places and takes_whole(first, self._archive.records[name].size, devices):
                self.places[name] = first.target
                if (device := torch_devices.holding(first.target)) != HOST:
                    self.devices[name] = device
        if self._together:
            wanted = dict.fromkeys([*self._by_record, *(pair.record for pair in self._in_order)])
            self.places |= self._archive.allocate([name for name in wanted if name not in self.places])

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
            rest = [pair for name, pairs in self._by_record.items() if name not in self.places for pair in pairs]
            _fill_in_order(self._archive, [*rest, *self._in_order], self.places)


def takes_whole(pair: Pair, nbytes: int, devices: bool = True) -> bool:
    """Whether the record's bytes, as they are, are those of the target, and can be read to there.

    Args:
        devices: whether devices can be sent bytes.
    """
    source, target = pair.source, pair.target
    within_reach = target.device.type == "cpu" if torch_devices.holding(target) == HOST else devices
    return (
        within_reach
        and source.stride() == target.stride()
        and source.storage_offset() == 0
        and source.numel() == span(source)  # dense: no gaps, nothing twice
        and source.nbytes == nbytes
    )


def _copy_to_others(pairs: list[Pair], filled: torch.Tensor | torch.UntypedStorage) -> None:
    """What shares the record with a tensor that has got it: from there, unless it shares memory here too."""
    for pair in pairs:
        source = view_of(pair.source, filled)
        here = (source.data_ptr(), source.stride()) == (pair.target.data_ptr(), pair.target.stride())
        if not (here and source.device == pair.target.device):
            pair.target.copy_(source)


def _fill_in_order(archive: Records, pairs: list[Pair], places: Mapping[str, Any]) -> None:
    """
    Args:
        places: of records that have been read. The others are read to temporaries.
    """
    batch: list[Pair] = []
    names: set[str] = set()
    held = 0
    for pair in pairs:
        if pair.record not in places and pair.record not in names:
            size = archive.records[pair.record].size
            if batch and held + size > _TEMPORARY_BYTES:
                _fill_batch(archive, batch, places)
                batch, names, held = [], set(), 0
            names.add(pair.record)
            held += size
        batch.append(pair)
    _fill_batch(archive, batch, places)


def _fill_batch(archive: Records, batch: list[Pair], places: Mapping[str, Any]) -> None:
    names = dict.fromkeys(pair.record for pair in batch if pair.record not in places)
    temporaries = {name: allocate(archive.records[name].size, archive.records[name].offset) for name in names}
    archive.fill(temporaries)
    for pair in batch:
        filled = temporaries[pair.record] if pair.record in temporaries else places[pair.record]
        pair.target.copy_(view_of(pair.source, filled))
