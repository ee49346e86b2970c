"""The archives of a file that holds one for each tensor, or part of one, and each value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ckpt._native import SavedStorage
from ckpt.plan.pickler import CLASSES, is_plain, pickle_object, short_way
from ckpt.plan.save_plan import COPY, OWNED, Archives
from ckpt.plan.shards import find_shards
from ckpt.plan.tensor_record import record_of
from ckpt.plan.views import ByteInterval, byte_interval
from ckpt.sharded.chunks import Box
from ckpt.sharded.contents import Item
from ckpt.sharded.entries import Entry
from ckpt.sharded.refusals import RefusedType, refuse_unpicklable

_SIMPLE = (str, int, float, bool, type(None))  # values that are the same object for whoever has the same value
_MOST_BITS = 64  # of an int; there are some that Python does not even show


class ArchiveBuilder:
    """Collects them.

    Attributes:
        records, kinds: of all archives, one behind the other; see SavePlan.
        payloads: see Contents.
        copied: the numbers of archives whose record is a copy that was made for it.
    """

    def __init__(self, eager_bytes: int) -> None:
        self.records: list[SavedStorage] = []
        self.kinds = bytearray()
        self.made = Archives([], [], [])
        self.payloads: list[int] = []
        self.copied: set[int] = set()
        self._eager_bytes = eager_bytes
        self._numbers: dict[Any, int] = {}  # of pickles that many archives share

    def add(self, number: int, key: str, entry: Entry) -> Iterator[Item]:
        if entry.shape is None:
            self.add_value(key, entry.value)
            yield Item(number, None)
            return
        for box in entry.boxes:
            self.add_tensor(part_of(entry.value, box))
            yield Item(number, box)

    def add_value(self, key: str, value: Any) -> None:
        name = name_of_value(value)
        number = self._numbers.get(name) if name is not None else None
        if number is None:
            data, records = pickle_value(key, value)
            refuse_shards_in(data)
            number = self._note_pickle(name, data)
            self._add(number, records)
        else:
            self._add(number, [])

    def add_tensor(self, tensor: torch.Tensor) -> None:
        dtype = tensor.dtype
        is_usual = type(tensor) is torch.Tensor and tensor.layout is torch.strided and dtype in CLASSES and is_plain(tensor)
        if not is_usual or not short_way():
            data, records = pickle_object(tensor)
            return self._add(self._note_pickle(None, data), records)
        size, stride = tuple(tensor.shape), tensor.stride()
        interval = byte_interval(int(tensor.storage_offset()), size, stride, dtype.itemsize)
        is_ours = interval.high - interval.low != tensor.numel() * dtype.itemsize
        if is_ours:  # else all that lies between its elements would be written, too
            tensor = tensor.contiguous()
            stride = tensor.stride()
            interval = ByteInterval(0, tensor.numel() * dtype.itemsize, dtype.itemsize)
        name = (dtype, size, stride)
        number = self._numbers.get(name)
        if number is None:
            # Nothing of it but its form is in the pickle; memory that nobody touches costs nothing.
            data, _ = pickle_object(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))
            number = self._note_pickle(name, data)
        self._add(number, [record_of(tensor, interval)])
        if tensor.is_contiguous():
            self.payloads[-1] = len(self.records) - 1
        if is_ours:
            self.copied.add(len(self.payloads) - 1)
            self.kinds[-1] = kind_of_copy(tensor, interval.high, self._eager_bytes)

    def _note_pickle(self, name: Any, data: bytes) -> int:
        number = len(self.made.pickles)
        self.made.pickles.append(data)
        if name is not None:
            self._numbers[name] = number
        return number

    def _add(self, number: int, records: list[SavedStorage]) -> None:
        self.made.pickle_of.append(number)
        self.made.records_of.append(len(records))
        self.payloads.append(-1)
        self.records.extend(records)
        self.kinds.extend(bytes(len(records)))


def name_of_value(value: Any) -> Any:
    """What is the same of all values with the same pickle, if that can be told without pickling them."""
    is_simple = type(value) in _SIMPLE and not (type(value) is int and value.bit_length() > _MOST_BITS)
    return (type(value), repr(value)) if is_simple else None


def kind_of_copy(tensor: torch.Tensor, nbytes: int, eager_bytes: int) -> int:
    """Nobody else has the memory of it."""
    return OWNED if nbytes > eager_bytes and tensor.is_cpu else COPY


def pickle_value(key: str, value: Any) -> tuple[bytes, list[SavedStorage]]:
    try:
        return pickle_object(value)
    except Exception as error:
        refuse_unpicklable(key, error)


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    if box.sizes == tensor.shape:
        return tensor
    for dim, (begin, size) in enumerate(zip(box.begin, box.sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, begin, size)
    return tensor


def refuse_shards_in(pickled: bytes) -> None:
    """Of values, which are pickled as they are on one rank."""
    if (kind := find_shards(pickled)) is not None:
        raise RefusedType(
            f"sharded= holds a {kind} inside of something that is saved as one value: torch.distributed.checkpoint looks for "
            "tensors in dicts and lists alone"
        )
