"""What a plan for a sharded state has found out, kept for the saves that follow.

From save to save the tensors of a state have new values, and mostly nothing else is new. Then who writes what, the pickles, and
how the file is divided are as they were; only the memory is looked up anew, each time, for each tensor. Whether nothing else is
new is told by the form of the state, which the core reads in one go (csrc/pickle/state_form.h), and by where each part
belongs in its whole. Nothing in here keeps a tensor alive.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch

from ckpt import torch_private
from ckpt._native import SavedStorage
from ckpt.plan.pickler import short_way, state_pickler
from ckpt.plan.save_plan import Archives
from ckpt.plan.shards import is_named_part
from ckpt.plan.views import ByteInterval
from ckpt.sharded.archives import ArchiveBuilder, name_of_value, part_of, pickle_value, refuse_shards_in
from ckpt.sharded.chunks import Box, kind_of
from ckpt.sharded.contents import Description, Item
from ckpt.sharded.entries import Entry, bare

_TENSOR, _VALUE = b"TV"
_PLAIN = (int, float, bool, str, bytes, tuple, list, NoneType)


class Look(NamedTuple):
    """At a state; see read_form() in the core.

    Attributes:
        tensors, records: of the leaves that are no values.
        specs: of the leaves that are parts of wholes.
        values: the other leaves.
    """

    form: bytes
    kinds: bytes
    tensors: list[torch.Tensor]
    records: list[SavedStorage]
    partial: list[int]
    specs: list[Any]
    values: list[Any]


class Known(NamedTuple):
    """The plan of a state of this form.

    Attributes:
        specs: of each part, what it says itself, taken apart.
        places: what that means.
        keys: of the leaves.
        tensors_at, values_at: which of the leaves are tensors, and which are values.
        described: of each leaf what must be the same on all ranks, if that is neither a tensor nor a value.
        plain: (leaf, number among the tensors) of each that is the same on all ranks.
        archives: without the pickles of values.
        payloads: see Contents.
        record_of: of each record, the number of its tensor.
        copies: the records that are copies: (record, number of the tensor, the part of it).
        values: (archive, number among the values) of those that this rank writes.
    """

    form: bytes
    specs: list[tuple[Any, ...]]
    places: list[Any]
    keys: list[str]
    tensors_at: list[int]
    values_at: list[int]
    described: list[Any]
    plain: list[tuple[int, int]]
    archives: Archives
    payloads: list[int]
    record_of: list[int]
    copies: list[tuple[int, int, Box]]
    values: list[tuple[int, int]]
    items: list[Item]
    description: Description | None


class PlanCache:
    """Of the newest form."""

    def __init__(self) -> None:
        self._known: Known | None = None

    def look(self, state: Mapping[str, Any]) -> Look | None:
        """None: there is something in it that must be asked for itself."""
        if type(state) is not dict or not short_way():
            return None
        found = state_pickler.read_form(state, wrapper=torch_private.wrapper_names(), is_value=_is_value)
        return None if found is None or any(map(_has_items, found[-1])) else Look(*found)

    def find(self, look: Look) -> Known | None:
        known = self._known
        if known is None or known.form != look.form:
            return None
        for old, spec, place in zip(known.specs, look.specs, known.places, strict=True):
            new = torch_private.spec_parts(spec)
            if new is None or (not all(map(operator.is_, old, new)) and _place_of(*new) != place):
                return None
        return known

    def keep(self, look: Look, entries: Mapping[str, Entry], items: list[Item], built: ArchiveBuilder,
             description: Description | None) -> None:  # fmt: skip
        """For find(). If it is nothing to be kept, nothing is."""
        self._known = _known(look, list(entries), list(entries.values()), items, built, description)


def renew(known: Known, look: Look, eager_bytes: int) -> ArchiveBuilder | None:
    """The archives, of memory and values that there are now; None if a value holds tensors.

    Raises:
        TypeError: a value cannot be pickled.
    """
    for number in look.partial:
        record = look.records[number]
        record.views = [ByteInterval(record.low, record.low + record.nbytes, look.tensors[number].dtype.itemsize)]
    built = ArchiveBuilder(eager_bytes)
    built.records = [look.records[number] for number in known.record_of]
    built.kinds = bytearray(len(built.records))
    built.payloads = known.payloads
    for at, number, box in known.copies:
        copied = ArchiveBuilder(eager_bytes)
        copied.add_tensor(part_of(look.tensors[number].detach(), box))
        built.records[at], built.kinds[at] = copied.records[0], copied.kinds[0]
    pickles, pickle_of = list(known.archives.pickles), list(known.archives.pickle_of)
    numbers: dict[Any, int] = {}
    for archive, index in known.values:
        value = look.values[index]
        name = name_of_value(value)
        number = -1 if name is None else numbers.get(name, -1)
        if number < 0:
            data, records = pickle_value(known.keys[known.values_at[index]], value)
            if records:
                return None
            refuse_shards_in(data)
            number = len(pickles)
            pickles.append(data)
            if name is not None:
                numbers[name] = number
        pickle_of[archive] = number
    built.made = Archives(pickles, pickle_of, known.archives.records_of)
    return built


def describe(known: Known, look: Look) -> dict[str, Any]:
    """What must be the same on all ranks, by keys."""
    described = list(known.described)
    for at, value in zip(known.values_at, look.values, strict=True):
        described[at] = value
    for at, number in known.plain:
        described[at] = bare(look.tensors[number])
    return dict(zip(known.keys, described, strict=True))


def name_tensors(known: Known, look: Look) -> dict[str, torch.Tensor]:
    return {known.keys[at]: tensor for at, tensor in zip(known.tensors_at, look.tensors, strict=True)}


def _known(look: Look, keys: list[str], entries: Sequence[Entry], items: list[Item], built: ArchiveBuilder,
           description: Description | None) -> Known | None:  # fmt: skip
    if len(look.kinds) != len(entries) or not _agree(look, entries):
        return None
    specs = [parts for parts in map(torch_private.spec_parts, look.specs) if parts is not None]
    if len(specs) != len(look.specs):
        return None
    tensors_at = [at for at, kind in enumerate(look.kinds) if kind != _VALUE]
    values_at = [at for at, kind in enumerate(look.kinds) if kind == _VALUE]
    number_of = {at: number for each in (tensors_at, values_at) for number, at in enumerate(each)}
    record_of: list[int] = []
    copies: list[tuple[int, int, Box]] = []
    values: list[tuple[int, int]] = []
    for archive, (item, count) in enumerate(zip(items, built.made.records_of, strict=True)):
        if item.box is None:
            if count:
                return None  # tensors, which nobody has looked at
            values.append((archive, number_of[item.key]))
            continue
        if count != 1:
            return None
        if archive in built.copied or item.box.sizes != tuple(look.tensors[number_of[item.key]].shape):
            copies.append((len(record_of), number_of[item.key], item.box))
        record_of.append(number_of[item.key])
    of_values = {built.made.pickle_of[archive] for archive, _ in values}
    if of_values & {number for archive, number in enumerate(built.made.pickle_of) if items[archive].box is not None}:
        return None
    return Known(
        form=look.form,
        specs=specs,
        places=[_place_of(*spec) for spec in specs],
        keys=keys,
        tensors_at=tensors_at,
        values_at=values_at,
        described=[entry.described if kind not in (_TENSOR, _VALUE) else None
                   for entry, kind in zip(entries, look.kinds, strict=True)],
        plain=[(at, number_of[at]) for at in tensors_at if look.kinds[at] == _TENSOR],
        archives=Archives(
            # Numbers stay as they are.
            [b"" if number in of_values else each for number, each in enumerate(built.made.pickles)],
            built.made.pickle_of,
            built.made.records_of,
        ),
        payloads=built.payloads,
        record_of=record_of,
        copies=copies,
        values=values,
        items=items,
        description=description,
    )  # fmt: skip


def _agree(look: Look, entries: Sequence[Entry]) -> bool:
    """The core has found the same leaves as torch, in the same order, and the memory of each where torch says it is."""
    tensors, values = iter(look.tensors), iter(look.values)
    for kind, entry in zip(look.kinds, entries, strict=True):
        if kind == _VALUE:
            if entry.shape is not None or next(values) is not entry.value:
                return False
        else:
            found, told = next(tensors), entry.value
            if entry.shape is None or (found.data_ptr(), found.shape, found.stride(), found.dtype) != (
                *(told.data_ptr(), told.shape, told.stride(), told.dtype),
            ):
                return False
    return True


def _place_of(mesh: Any, placements: Sequence[Any], whole: Any) -> Any:
    """Of a part in its whole: by the mesh itself, since meshes that are equal may lie in different places of the job, and by
    what placements are, since torch before 2.13 takes one that is sharded in strides for equal to one that is not."""
    return tuple(whole.shape), id(mesh), tuple(map(kind_of, placements))


def _has_items(value: Any) -> bool:
    """It says by itself what of it is saved, though its class does not."""
    return type(value) not in _PLAIN and (hasattr(value, "__create_write_items__") or is_named_part(value))


def _is_value(kind: type) -> bool:
    if issubclass(kind, (Mapping, list, torch.Tensor)) or hasattr(kind, "__create_write_items__"):
        return False
    return not (callable(getattr(kind, "state_dict", None)) or "ShardedTensor" in kind.__name__)
