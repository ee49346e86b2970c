"""From an object to what must be written: its pickle, and how each of the storages that it names leaves: copied, or lazily."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.storage import UntypedStorage

from ckpt import _native, device_modes
from ckpt import devices as torch_devices
from ckpt._native import SavedStorage
from ckpt.devices import HOST
from ckpt.plan.lazy_storages import LazyStorages, find_writers
from ckpt.plan.pickler import pickle_object
from ckpt.plan.shared_memory import SharedMemory

COPY, LAZY, OWNED = _native.COPY, _native.LAZY, _native.OWNED  # the kinds of records: see _native.pyi

_location = operator.attrgetter("location")


class Archives(NamedTuple):
    """Of a file that holds several, one behind the other. The records are those of the first archive, then of the second, ...

    Attributes:
        pickles: several archives may share one.
        pickle_of: of each archive, which of them is its pickle.
        records_of: of each archive, how many records it has.
    """

    pickles: list[bytes]
    pickle_of: list[int]
    records_of: list[int]


@dataclasses.dataclass(slots=True)
class SavePlan:
    """What submit() needs. The lists have one entry for each record.

    Attributes:
        archives: None: the file holds one archive, whose pickle is `pickle`.
        compared: what must be the same on all ranks, if that is not the plan itself. Not written.
        named: what names a tensor in an error, if that is not what is saved.
        contents: what the format notes of it, for the commit.
        numbers: of the records, by which the pickle knows them; empty: 0, 1, 2, ...
        reference: to the file with the other records, if there are any: see directory/frozen_files.py.
    """

    pickle: bytes
    records: list[SavedStorage]
    sizes: list[int]  # bytes
    kinds: bytearray  # COPY, LAZY or OWNED
    addresses: list[int] = dataclasses.field(default_factory=list)
    lazy: list[SavedStorage] = dataclasses.field(default_factory=list)  # the records of kind LAZY
    devices: list[int] = dataclasses.field(default_factory=list)  # on which they lie, or HOST; empty: all on the host
    device_mode: device_modes.Mode | None = None  # None: nothing lies on devices
    device_mode_reason: str = ""
    archives: Archives | None = None
    compared: SavePlan | None = None
    named: Any = None
    contents: Any = None
    numbers: Sequence[int] = ()
    reference: Any = None

    def device_bytes(self) -> int:
        """Of the records that leave from devices."""
        return sum(size for size, device in zip(self.sizes, self.devices, strict=False) if device != HOST)


def make_plan(obj: Any, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str = False) -> SavePlan:
    """Pickles `obj` and lists its storages.

    Args:
        lazy: gives the storages that change only behind a fence.
        eager_bytes: records on the host of at most this many bytes are copied at once all the same.
        device_lazy: as `Options.device_lazy`: how records on CUDA devices leave.

    Raises:
        RuntimeError: some memory is referenced as several dtypes in a way that no file can express.
        whatever pickling `obj` raises.
    """
    data, records = pickle_object(obj)
    return place(SavePlan(data, records, [], bytearray(len(records))), lazy, eager_bytes, device_lazy)


def structure_of(obj: Any) -> SavePlan:
    """The pickle, the sizes, and where the bytes are now; what make_plan() gives where it is the same state. Copies nothing.

    Raises:
        as make_plan().
    """
    data, records = pickle_object(obj)
    plan = SavePlan(data, records, [], bytearray(len(records)))
    plan.addresses, plan.sizes, _ = _native.choose_kinds(
        records, lambda _: False, find_writers, lambda _, __: False, 0, [], False, plan.kinds
    )
    return plan


def addresses_on_host(plan: SavePlan, copied: bool) -> list[int]:
    """Where the bytes of each record can be looked at; 0 where they cannot.

    Args:
        copied: also where make_plan() has copied what lay on a device. Another rank that has only the structure has no copy.
    """
    if copied and plan.devices:
        return [address if device == HOST else 0 for address, device in zip(plan.addresses, plan.devices, strict=True)]
    if copied:
        return plan.addresses
    if torch_devices.in_use.in_host_memory:
        return [0] * len(plan.addresses)
    locations = map(_location, plan.records)
    return [address if location == "cpu" else 0 for address, location in zip(plan.addresses, locations, strict=True)]


def _copy_to_host(storage: UntypedStorage, low: int, nbytes: int) -> UntypedStorage:
    """Bytes [low, low + nbytes) of a device storage, now."""
    view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, low, (nbytes,), (1,))
    return view.cpu().untyped_storage()


def place(plan: SavePlan, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
    """Finds out of each record where it lies and how it may leave; one whose kind is OWNED already keeps that.

    Args:
        lazy, eager_bytes, device_lazy: as of make_plan().
    """
    records = plan.records
    plan.devices = _find_devices(plan, eager_bytes, device_lazy)
    shared = SharedMemory()
    plan.addresses, plan.sizes, plan.lazy = _native.choose_kinds(
        records, lazy, find_writers, shared.has, eager_bytes, plan.devices, plan.device_mode == "lazy", plan.kinds
    )
    return plan


def _find_devices(plan: SavePlan, eager_bytes: int, device_lazy: bool | str) -> list[int]:
    """On which device each record lies; empty if all are on the host, to which those are copied that cannot stay.

    Notes in the plan how the others leave.
    """
    records = plan.records
    elsewhere = list(range(len(records))) if torch_devices.in_use.in_host_memory else _native.find_elsewhere(records)
    devices = [HOST] * len(records) if elsewhere else []
    for index in elsewhere:
        if records[index].nbytes and device_lazy:
            devices[index] = torch_devices.index_of(records[index].storage)
    if found := set(devices) - {HOST}:
        plan.device_mode, plan.device_mode_reason = device_modes.mode_of(found, device_lazy)
        if plan.device_mode == "host":
            devices = [HOST] * len(records)
    for index in elsewhere:
        record = records[index]
        if devices[index] == HOST and record.location != "cpu":
            record.storage, record.low, record.tensor = _copy_to_host(record.storage, record.low, record.nbytes), 0, None
            record.address = 0
            plan.kinds[index] = OWNED if record.nbytes > eager_bytes else COPY
    return devices if any(device != HOST for device in devices) else []
