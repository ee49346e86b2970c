"""Which tensors of a dict share memory, as safetensors sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ckpt._native import SavedStorage


class Area(NamedTuple):
    """The memory of a tensor: the storage, by where it lies and its size, and bytes [begin, end) of that."""

    name: str
    storage: tuple[str, int, int]
    begin: int
    end: int

    @property
    def is_whole(self) -> bool:
        return (self.begin, self.end) == (0, self.storage[-1])


def areas_of(names: Sequence[str], records: Sequence[SavedStorage]) -> list[Area]:
    """Of tensors that have elements; none if each has a storage of its own, as nearly always."""
    addresses = [record.address or record.storage.data_ptr() for record in records]
    if len(set(addresses)) == len(records):
        return []
    return [
        Area(name, (record.location, address, record.storage.nbytes()), record.low, record.low + record.nbytes)
        for name, record, address in zip(names, records, addresses, strict=True)
        if record.nbytes
    ]


def find_shared(areas: Iterable[Area]) -> list[list[Area]]:
    """The groups that save_file refuses: of one storage, and each begins before the one before it ends."""
    by_storage: dict[Any, list[tuple[int, int, str, Area]]] = defaultdict(list)
    for area in areas:
        by_storage[area.storage].append((area.begin, area.end, area.name, area))
    groups: list[list[Area]] = []
    for within in by_storage.values():
        last = 0
        groups.append([])
        for begin, end, _, area in sorted(within):
            if groups[-1] and begin >= last:
                groups.append([])
            groups[-1].append(area)
            last = end
    return [group for group in groups if len(group) > 1]


def one_of_each(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Without tensors that share memory with others, and what was left out for what, as `safetensors.torch.save_model` does it.

    Raises:
        ValueError: of some that overlap none is the whole storage.
    """
    kept, left_out = dict(state), {}
    for group in find_shared(area for name, value in state.items() if (area := _area_of(name, value)) is not None):
        whole = sorted(area.name for area in group if area.is_whole)
        if not whole:
            names = ", ".join(repr(area.name) for area in group)
            raise ValueError(f"of {names}, which share memory, none has all of it: save their clone()")
        for area in group:
            if area.name != whole[0]:
                left_out[area.name] = whole[0]
                del kept[area.name]
    return kept, left_out


def _area_of(name: str, value: Any) -> Area | None:
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
    if not dense or not value.numel():
        return None
    storage = value.untyped_storage()
    begin = int(value.storage_offset())
    steps = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    end = begin + steps + 1
    return Area(name, (str(value.device), storage.data_ptr(), storage.nbytes()), begin * value.itemsize, end * value.itemsize)
