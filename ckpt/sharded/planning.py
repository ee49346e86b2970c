"""From a sharded state to the archives that this rank writes, without a word to the other ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ckpt._native import SavedStorage
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.save_plan import OWNED, Archives, SavePlan, place, structure_of
from ckpt.sharded.archives import ArchiveBuilder, pickle_value, refuse_shards_in
from ckpt.sharded.contents import Contents, Description, Item, Key
from ckpt.sharded.entries import Entry, EntryFinder, resolve
from ckpt.sharded.owners import find_owned
from ckpt.sharded.plan_cache import Look, PlanCache, describe, name_tensors, renew


class Candidate(NamedTuple):
    """An archive of one tensor, or a part of one.

    Attributes:
        name: tells it from all others of the state.
    """

    record: SavedStorage
    name: str
    item: Item


# Chooses the numbers, among these, of those that go to another file.
ChooseArchives = Callable[[Sequence[Candidate]], Collection[int]]


class ShardedPlanner:
    """Of one rank.

    Args:
        finder: of this rank.
        rank, world_size: of this process in the job.
    """

    def __init__(self, finder: EntryFinder, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._finder = finder
        self._cache = PlanCache()

    def plan(
        self,
        state: Mapping[str, Any],
        lazy: LazyStorages,
        eager_bytes: int,
        device_lazy: bool | str,
        apart: ChooseArchives | None = None,
    ) -> SavePlan:
        """As make_plan(). `contents` of the plan is a Contents.

        Args:
            apart: chooses those archives that go to another file.

        Raises:
            TypeError, ValueError: something of the state cannot be saved as sharded; says why.
        """
        given = resolve(state)
        look = self._cache.look(given)
        known = None if look is None else self._cache.find(look)
        if look is None or known is None or (built := renew(known, look, eager_bytes)) is None:
            return self._plan_anew(given, look, lazy, eager_bytes, device_lazy, apart)
        items = known.items
        if apart is not None:
            built, items = _take_apart(built, items, known.keys, apart)
        plan = self._planned(built, lazy, eager_bytes, device_lazy)
        plan.compared = self._compared(describe(known, look))
        plan.named = name_tensors(known, look)
        plan.contents = Contents(items, built.payloads, known.description)
        return plan

    def _plan_anew(
        self,
        given: dict[str, Any],
        look: Look | None,
        lazy: LazyStorages,
        eager_bytes: int,
        device_lazy: bool | str,
        apart: ChooseArchives | None,
    ) -> SavePlan:
        entries, paths = self._finder.find(given)
        owned = find_owned((entry.group, entry.nbytes) for entry in entries.values())
        built = ArchiveBuilder(eager_bytes)
        items = [item for number, (key, entry) in enumerate(entries.items()) if number in owned
                 for item in built.add(number, key, entry)]  # fmt: skip
        description = _describe(entries, paths) if self._rank == 0 else None
        if look is not None:
            self._cache.keep(look, entries, items, built, description)
        if apart is not None:
            built, items = _take_apart(built, items, list(entries), apart)
        plan = self._planned(built, lazy, eager_bytes, device_lazy)
        plan.compared = self._compared({key: entry.described for key, entry in entries.items()})
        plan.named = {key: entry.value for key, entry in entries.items()}
        plan.contents = Contents(items, built.payloads, description)
        return plan

    def _planned(self, built: ArchiveBuilder, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        plan = SavePlan(b"", built.records, [], built.kinds, archives=built.made)
        return place(plan, lazy, eager_bytes, device_lazy)

    def _compared(self, described: dict[str, Any]) -> SavePlan:
        """What is the same on all ranks: the values, and all that is known of the tensors beside the bytes of shards."""
        if self._world_size == 1:
            return SavePlan(b"", [], [], bytearray())
        try:
            compared = structure_of(described)
        except Exception:
            for key, value in described.items():
                pickle_value(key, value)
            raise
        refuse_shards_in(compared.pickle)
        return compared


def _take_apart(
    built: ArchiveBuilder, items: list[Item], keys: Sequence[str], apart: ChooseArchives
) -> tuple[ArchiveBuilder, list[Item]]:
    """What is left once some archives have gone to another file. What was given stays as it is: it may be kept."""
    counts = built.made.records_of
    firsts = list(itertools.accumulate(counts, initial=0))
    places = [place for place, item in enumerate(items) if item.box is not None and counts[place] == 1]
    places = [place for place in places if place not in built.copied]
    chosen = apart([Candidate(built.records[firsts[each]], _name_of(items[each], keys), items[each]) for each in places])
    gone = {places[number] for number in chosen}
    left = [place for place in range(len(items)) if place not in gone]
    numbers = [number for place in left for number in range(firsts[place], firsts[place + 1])]
    now = {number: at for at, number in enumerate(numbers)}
    rest = ArchiveBuilder(0)
    rest.records = [built.records[number] for number in numbers]
    rest.kinds = bytearray(built.kinds[number] for number in numbers)
    rest.made = Archives(built.made.pickles, [built.made.pickle_of[each] for each in left], [counts[each] for each in left])
    rest.payloads = [now.get(built.payloads[each], -1) for each in left]
    return rest, [items[each] for each in left]


def _name_of(item: Item, keys: Sequence[str]) -> str:
    return keys[item.key] if item.box is None else f"{keys[item.key]} from {list(item.box.offsets)}, {list(item.box.sizes)}"


def plan_tensors(
    tensors: Iterable[tuple[torch.Tensor, bool]], lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str
) -> SavePlan:
    """Of a file that holds an archive for each tensor.

    Args:
        tensors: each with whether its memory stays as it is until the file is durable, so that nothing of it need be copied.
    """
    archives = ArchiveBuilder(eager_bytes)
    for tensor, stays in tensors:
        first = len(archives.records)
        archives.add_tensor(tensor.detach())
        for index in range(first, len(archives.records)):
            if stays and tensor.is_cpu and archives.records[index].nbytes > eager_bytes:
                archives.kinds[index] = OWNED
    plan = SavePlan(b"", archives.records, [], archives.kinds, archives=archives.made)
    place(plan, lazy, eager_bytes, device_lazy)
    plan.named = {}
    plan.contents = Contents([], archives.payloads, None)
    return plan


def _describe(entries: Mapping[str, Entry], paths: dict[str, tuple[Any, ...]]) -> Description:
    from torch.distributed.checkpoint.metadata import TensorProperties

    known: dict[Any, Any] = {}  # most tensors are alike
    with_strides = any(field.name == "strides" for field in dataclasses.fields(TensorProperties))  # torch 2.15

    def properties_of(entry: Entry) -> Any:
        if entry.shape is None:
            return None
        tensor = entry.value
        strides = tensor.stride() if with_strides and tensor.layout is torch.strided else None
        name = tensor.dtype, tensor.layout, tensor.is_pinned(), entry.requires_grad, strides
        found = known.get(name)
        if found is None:
            found = known[name] = TensorProperties.create_from_tensor(tensor)
            found.requires_grad = entry.requires_grad
        return found

    return Description([Key(key, entry.shape, properties_of(entry)) for key, entry in entries.items()], paths)
