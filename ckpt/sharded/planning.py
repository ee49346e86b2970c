"""From a sharded state to the archives that this rank writes, without a word to the other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.serialization import location_tag

from ckpt._native import SavedStorage
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.pickler import CLASSES, is_plain, pickle_object, short_way
from ckpt.plan.save_plan import OWNED, Archives, SavePlan, place, structure_of
from ckpt.plan.shards import find_shards
from ckpt.plan.views import ByteInterval, byte_interval
from ckpt.sharded.chunks import Box
from ckpt.sharded.contents import Contents, Description, Item, Key
from ckpt.sharded.entries import Entry, EntryFinder
from ckpt.sharded.owners import find_owned
from ckpt.sharded.refusals import RefusedType, refuse_unpicklable

_SIMPLE = (str, int, float, bool, type(None))  # values that are the same object for whoever has the same value


class ShardedPlanner:
    """Of one rank.

    Args:
        finder: of this rank.
        rank, world_size: of this process in the job.
    """

    def __init__(self, finder: EntryFinder, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._finder = finder

    def plan(self, state: Mapping[str, Any], lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        """As make_plan(). `contents` of the plan is a Contents.

        Raises:
            TypeError, ValueError: something of the state cannot be saved as sharded; says why.
        """
        entries, paths = self._finder.find(state)
        owned = find_owned((entry.group, entry.nbytes) for entry in entries.values())
        archives = _Archives(eager_bytes)
        items = [item for number, (key, entry) in enumerate(entries.items()) if number in owned
                 for item in archives.add(number, key, entry)]  # fmt: skip
        plan = SavePlan(b"", archives.records, [], archives.kinds, archives=archives.made)
        place(plan, lazy, eager_bytes, device_lazy)
        plan.compared = self._compared(entries)
        plan.named = {key: entry.value for key, entry in entries.items()}
        plan.contents = Contents(items, archives.payloads, _describe(entries, paths) if self._rank == 0 else None)
        return plan

    def _compared(self, entries: Mapping[str, Entry]) -> SavePlan:
        """What is the same on all ranks: the values, and all that is known of the tensors beside the bytes of shards."""
        if self._world_size == 1:
            return SavePlan(b"", [], [], bytearray())
        described = {key: entry.described for key, entry in entries.items()}
        try:
            compared = structure_of(described)
        except Exception:
            for key, value in described.items():
                _pickle_value(key, value)
            raise
        _refuse_shards_in(compared.pickle)
        return compared


class _Archives:
    """Collects them."""

    def __init__(self, eager_bytes: int) -> None:
        self.records: list[SavedStorage] = []
        self.kinds = bytearray()
        self.made = Archives([], [], [])
        self.payloads: list[int] = []
        self._eager_bytes = eager_bytes
        self._numbers: dict[Any, int] = {}  # of pickles that many archives share

    def add(self, number: int, key: str, entry: Entry) -> Iterator[Item]:
        if entry.shape is None:
            self._add_value(key, entry.value)
            yield Item(number, None)
            return
        for box in entry.boxes:
            self._add_tensor(_part_of(entry.value, box))
            yield Item(number, box)

    def _add_value(self, key: str, value: Any) -> None:
        name = (type(value), repr(value)) if type(value) in _SIMPLE else None
        number = self._numbers.get(name) if name is not None else None
        if number is None:
            data, records = _pickle_value(key, value)
            _refuse_shards_in(data)
            number = self._note_pickle(name, data)
            self._add(number, records)
        else:
            self._add(number, [])

    def _add_tensor(self, tensor: torch.Tensor) -> None:
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
            data, _ = pickle_object(torch.empty_strided(size, stride, dtype=dtype))
            number = self._note_pickle(name, data)
        self._add(number, [_record(tensor, interval)])
        if tensor.is_contiguous():
            self.payloads[-1] = len(self.records) - 1
        if is_ours and interval.high > self._eager_bytes and tensor.is_cpu:
            self.kinds[-1] = OWNED

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


def plan_tensors(
    tensors: Iterable[tuple[torch.Tensor, bool]], lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str
) -> SavePlan:
    """Of a file that holds an archive for each tensor.

    Args:
        tensors: each with whether its memory stays as it is until the file is durable, so that nothing of it need be copied.
    """
    archives = _Archives(eager_bytes)
    for tensor, stays in tensors:
        first = len(archives.records)
        archives._add_tensor(tensor.detach())
        for index in range(first, len(archives.records)):
            if stays and tensor.is_cpu and archives.records[index].nbytes > eager_bytes:
                archives.kinds[index] = OWNED
    plan = SavePlan(b"", archives.records, [], archives.kinds, archives=archives.made)
    place(plan, lazy, eager_bytes, device_lazy)
    plan.named = {}
    plan.contents = Contents([], archives.payloads, None)
    return plan


def _pickle_value(key: str, value: Any) -> tuple[bytes, list[SavedStorage]]:
    try:
        return pickle_object(value)
    except Exception as error:
        refuse_unpicklable(key, error)


def _part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    if box.sizes == tensor.shape:
        return tensor
    for dim, (begin, size) in enumerate(zip(box.begin, box.sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, begin, size)
    return tensor


def _record(tensor: torch.Tensor, interval: ByteInterval) -> SavedStorage:
    storage = tensor.untyped_storage()
    record = SavedStorage(storage, "0", tensor.dtype, tensor, interval.high - interval.low)
    if record.nbytes != storage.nbytes():
        record.low, record.views = interval.low, [interval]
    if not tensor.is_cpu:
        record.location = location_tag(storage)
    return record


def _refuse_shards_in(pickled: bytes) -> None:
    """Of values, which are pickled as they are on one rank."""
    if (kind := find_shards(pickled)) is not None:
        raise RefusedType(
            f"sharded= holds a {kind} inside of something that is saved as one value: torch.distributed.checkpoint looks for "
            "tensors in dicts and lists alone"
        )


def _describe(entries: Mapping[str, Entry], paths: dict[str, tuple[Any, ...]]) -> Description:
    from torch.distributed.checkpoint.metadata import TensorProperties

    known: dict[Any, Any] = {}  # most tensors are alike

    def properties_of(entry: Entry) -> Any:
        if entry.shape is None:
            return None
        tensor = entry.value
        name = tensor.dtype, tensor.layout, tensor.is_pinned(), entry.requires_grad
        found = known.get(name)
        if found is None:
            found = known[name] = TensorProperties.create_from_tensor(tensor)
            found.requires_grad = entry.requires_grad
        return found

    return Description([Key(key, entry.shape, properties_of(entry)) for key, entry in entries.items()], paths)
