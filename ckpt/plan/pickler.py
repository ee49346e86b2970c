"""The pickle of an object, and the storages that it names.

The pickle is the one `torch.save` makes, opcode for opcode, wherever both write whole storages. What state dicts are made of
is pickled natively (csrc/pickle/state_pickler.cc), because it is all that save() costs its caller; an object with anything
else in it goes through Python's own pickler. There, plain strided tensors take a short way through `reducer_override`;
everything else (subclasses, sparse, quantized, nested, ...) takes torch's own `__reduce_ex__`, whose parts come back here.

Two passes at most. The first assumes whole storages and notes which bytes of each are viewed. Only if some storage turns out
to be viewed in part, or as two dtypes, a second pass names virtual storages instead (see views.py).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pickle
from collections import OrderedDict
from types import FunctionType, NoneType
from typing import Any

import torch
from torch.nn.parameter import Parameter
from torch.serialization import location_tag, normalize_storage_type
from torch.storage import TypedStorage, UntypedStorage

from ckpt import _native
from ckpt._native import SavedStorage
from ckpt.plan.views import ByteInterval, VirtualStorages, byte_interval
from ckpt.torch_private import NEWER_DTYPES, STORAGE_CLASSES, direct_calls, has_hooks, key_of, parts_of, rebuilding, warn_once

_PROTOCOL = 2  # the only one that weights_only loading accepts in full
rebuild = rebuilding()
_strided = torch.strided
_EMPTY_DICT = (OrderedDict, ())
_has_names = getattr(torch.Tensor, "has_names", None)  # named tensors, which torch.save refuses, are gone from newer torch


def _storage_classes() -> dict[torch.dtype, tuple[Any, int]]:
    """For each dtype on the short way: the class that names it in the pickle (None: untyped) and its bytes per element."""
    quantized = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}
    named = {dtype: name for dtype, name in STORAGE_CLASSES.items() if dtype not in quantized}
    classes = {dtype: (getattr(torch, name), dtype.itemsize) for dtype, name in named.items()}
    return classes | {dtype: (None, dtype.itemsize) for dtype in NEWER_DTYPES}


CLASSES = _storage_classes()


@dataclasses.dataclass(slots=True)
class _Remap:
    """What the first pass found out about one storage."""

    untyped: bool
    virtual: VirtualStorages | None  # None: write it whole


# The pickler asks for the persistent id of every single object, a dozen for each tensor: these are answered natively.
_NO_STORAGES = (str, int, float, bool, NoneType, tuple, list, dict, OrderedDict, type, FunctionType, torch.Tensor, Parameter)
_TWO_DTYPES = (
    "cannot save tensors or storages that view the same data as different types, if one of them is not a plain strided tensor "
    "or is made anew by each pickling (torch.save cannot either); save a clone of one of them"
)


class _UnstableError(Exception):
    """Pickling the object a second time gave other views than the first time."""


class StorageTable:
    """The storages met so far, in the order in which torch.save numbers them."""

    def __init__(self, remaps: dict[int, _Remap]) -> None:
        self.records: dict[Any, SavedStorage] = {}  # storage -> record; (storage, run) -> record
        self.order: list[SavedStorage] = []
        self.conflicts: set[int] = set()  # storages seen as more than one dtype
        self._remaps = remaps
        self._left_to_torch: list[torch.Tensor] = []

    # ---- tensors that take the short way ---------------------------------------------------------------------------

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            if obj.layout is _strided and obj.dtype in CLASSES and is_plain(obj):
                return self.reduce(obj)
        elif kind is OrderedDict:
            if not obj and not obj.__dict__:
                return _EMPTY_DICT  # the hooks of every tensor; the long way costs as much as the rest of the tensor
        elif kind is Parameter and not obj.__dict__ and rebuild is not None:
            return rebuild.parameter, (obj.detach(), obj.requires_grad, OrderedDict())  # .data counts versions apart
        return self.note(obj)

    def note(self, obj: Any) -> Any:
        """Leaves it to torch's own pickling, which names its storage but not the tensor."""
        if isinstance(obj, torch.Tensor):
            self._left_to_torch.append(obj)
        return NotImplemented

    def watch_noted(self) -> None:
        """When all is pickled: their storages have records then."""
        for tensor in self._left_to_torch:
            try:
                record = self.records.get(key_of(tensor.untyped_storage()))
            except Exception:  # sparse and the like have no storage of their own
                continue
            if record is not None:
                _watch(record, tensor)
        self._left_to_torch.clear()

    def reduce(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        assert rebuild is not None
        storage = tensor.untyped_storage()
        dtype = tensor.dtype
        named, itemsize = CLASSES[dtype]
        offset, size, stride = int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride()
        cdata = key_of(storage)
        remap = self._remaps.get(cdata) if self._remaps else None
        if remap is None:
            record = self.records.get(cdata)
            if record is None:
                record = self._add(cdata, storage, named and dtype, tensor, tensor.is_cpu)
            else:
                _watch(record, tensor)
                if record.dtype is not (named and dtype):
                    self.conflicts.add(cdata)
            if offset == 0 and tensor.numel() * itemsize == record.nbytes:
                record.whole = True
            elif (interval := byte_interval(offset, size, stride, itemsize)).high > record.nbytes:
                record.whole = True  # the storage was shrunk below its tensor (FSDP): there is nothing but all of it
            else:
                _see(record, interval)
        else:
            if remap.untyped:
                named = None
            record, offset = self._find_run(remap, cdata, storage, tensor, offset)
        record.type = named or UntypedStorage
        record.numel = record.nbytes // itemsize if named else record.nbytes
        if named is None:
            return rebuild.tensor_of_dtype, (record, offset, size, stride, tensor.requires_grad, OrderedDict(), dtype)
        return rebuild.tensor, (record, offset, size, stride, tensor.requires_grad, OrderedDict())

    def _find_run(
        self, remap: _Remap, cdata: int, storage: UntypedStorage, tensor: torch.Tensor, offset: int
    ) -> tuple[SavedStorage, int]:
        """The record for the run that holds the tensor, and the tensor's offset in it, in elements."""
        dtype, itemsize = tensor.dtype, tensor.dtype.itemsize
        interval = byte_interval(offset, tensor.size(), tensor.stride(), itemsize)
        if remap.virtual is None:
            record = self._find_or_add(cdata, storage, dtype, tensor)
            record.whole = True
            _see(record, interval)
            return record, offset
        run = remap.virtual.find(interval)
        if run < 0 and interval.low < interval.high:
            raise _UnstableError
        record = self._find_or_add((cdata, run), storage, dtype, tensor)
        low, high = remap.virtual.runs[run] if run >= 0 else (interval.low, interval.low)
        record.low, record.nbytes = low, high - low
        _see(record, interval)
        return record, (interval.low - low) // itemsize

    def _find_or_add(self, key: Any, storage: UntypedStorage, dtype: Any, tensor: torch.Tensor) -> SavedStorage:
        record = self.records.get(key)
        if record is None:
            return self._add(key, storage, dtype, tensor, tensor.is_cpu)
        _watch(record, tensor)
        return record

    def _add(self, key: Any, storage: UntypedStorage, dtype: Any, tensor: torch.Tensor | None, on_cpu: bool) -> SavedStorage:
        self.records[key] = record = SavedStorage(storage, str(len(self.order)), dtype, tensor, storage.nbytes())
        if not on_cpu:
            record.location = location_tag(storage)
        self.order.append(record)
        return record

    # ---- storages --------------------------------------------------------------------------------------------------

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is SavedStorage:
            return ("storage", obj.type, obj.key, obj.location, obj.numel)
        if isinstance(obj, (TypedStorage, UntypedStorage)) or torch.is_storage(obj):
            return self._storage_id(obj)
        return None

    def _storage_id(self, obj: Any) -> tuple[Any, ...]:
        """A storage that torch's own pickling, or the user, hands us: always written whole."""
        if isinstance(obj, TypedStorage):
            storage, class_name, numel = parts_of(obj)
            storage_type, dtype = getattr(torch, class_name), obj.dtype
        else:
            storage, dtype = obj, None
            storage_type, numel = normalize_storage_type(type(obj)), obj.nbytes()
        cdata = key_of(storage)
        record = self.records.get(cdata)
        if record is None:
            record = self._add(cdata, storage, dtype, None, storage.device.type == "cpu")
        elif record.dtype is not dtype and cdata not in self._remaps:
            self.conflicts.add(cdata)
        record.whole = True
        record.typed = record.typed or dtype is not None
        return ("storage", storage_type, record.key, record.location, numel)


class _TorchPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, table: StorageTable, short: bool) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        # Bound to the table, not to this object: a cycle would keep all that was pickled until the next collection.
        self.persistent_id = _native.type_filter(_NO_STORAGES, table.persistent_id)  # type: ignore[method-assign]
        self.reducer_override = table.reducer_override if short else table.note  # type: ignore[method-assign]


def is_plain(tensor: torch.Tensor) -> bool:
    """No attribute, hook, lazy conjugation or nesting that torch's own pickling would have to look at."""
    return (
        (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor.is_nested
        and not (_has_names is not None and _has_names(tensor))
        and not tensor.__dict__
        and not has_hooks(tensor)
    )


def _watch(record: SavedStorage, tensor: torch.Tensor) -> None:
    """One more tensor in its storage, which may count versions for itself."""
    if record.tensor is None:
        record.tensor = tensor
    elif record.others is None:
        record.others = [tensor]
    else:
        record.others.append(tensor)


def _see(record: SavedStorage, interval: ByteInterval) -> None:
    """A view that does not cover the storage, or not for itself what of it is saved."""
    if record.views is None:
        record.views = [interval]
    else:
        record.views.append(interval)


def find_remaps(table: StorageTable) -> dict[int, _Remap]:
    """What a second pass must do differently; empty if nothing."""
    remaps: dict[int, _Remap] = {}
    if not table.conflicts and _native.are_whole(table.order):
        return remaps  # as nearly always
    for cdata, record in table.records.items():
        untyped = cdata in table.conflicts
        if untyped and record.typed:
            raise RuntimeError(_TWO_DTYPES)
        virtual = None
        if not record.whole:
            virtual = VirtualStorages(record.views or ())
            if virtual.covers(record.nbytes):
                virtual = None
        if untyped or virtual is not None:
            remaps[cdata] = _Remap(untyped, virtual)
    return remaps


def _opcodes_of(named: Any) -> bytes:
    """What names a function, class or dtype in a pickle; without the opcodes that begin, memoize and end."""
    data = pickle.dumps(named, _PROTOCOL)
    return data[data.index(b"c") : data.rindex(b"\n") + 1]


def make_state_pickler(exchange: bool = True, calls: bool = True) -> _native.StatePickler:
    """
    Args:
        exchange: ask tensors by the exchange API of DLPack where this torch has it.
        calls: ask them by functions of torch's libraries, too, where these are as expected.
    """
    direct = direct_calls(CLASSES) if exchange and calls else None
    named = [*(rebuild or ()), OrderedDict, UntypedStorage, *CLASSES]
    named += [storage_class for storage_class, _ in CLASSES.values() if storage_class is not None]
    return _native.StatePickler(
        globals={each: _opcodes_of(each) for each in named},
        # Tensors may have names in older torch, which the pickler in Python refuses.
        classes=CLASSES if _has_names is None else {},
        tensor_type=torch.Tensor,
        parameter_type=Parameter,
        ordered_dict=OrderedDict,
        dtype_type=torch.dtype,
        strided=_strided,
        rebuild_tensor=rebuild and rebuild.tensor,
        location_tag=location_tag,
        probe=torch.empty_strided((2, 1, 3), (9, 7, 2), device="cpu")
        if exchange
        else None,  # whether it tells strides as they are
        calls=direct and direct.asked,
        refused=direct.refused if direct else [],
        dtypes=direct.of_dtypes if direct else {},
    )


state_pickler = make_state_pickler()


def dump(obj: Any, remaps: dict[int, _Remap]) -> tuple[bytes, StorageTable]:
    """Natively what state dicts are made of; from the beginning and in Python if there is anything else among it."""
    if not short_way():
        return dump_in_python(obj, remaps, short=False)
    table = StorageTable(remaps)
    data = state_pickler.dump(obj, records=table.records, order=table.order, remaps=remaps, reduce=table.reducer_override)
    return (data, table) if data is not None else dump_in_python(obj, remaps)


def dump_in_python(obj: Any, remaps: dict[int, _Remap], short: bool = True) -> tuple[bytes, StorageTable]:
    """
    Args:
        short: plain tensors take the short way; else torch's own, as whole storages.
    """
    buffer, table = io.BytesIO(), StorageTable(remaps)
    _TorchPickler(buffer, table, short).dump(obj)
    table.watch_noted()
    return buffer.getvalue(), table


@functools.cache
def short_way() -> bool:
    """Whether this torch pickles tensors as is assumed here."""
    try:
        agrees = _is_short_way_right()
    except Exception:
        agrees = False
    if not agrees:
        warn_once("tensors are pickled by torch's own methods, which takes longer, and views are saved as their whole storages")
    return agrees


def _is_short_way_right() -> bool:
    whole = torch.zeros(3, device="cpu")
    sample = [
        whole,
        Parameter(whole),
        torch.ones_like(whole[1:], dtype=torch.bfloat16),
        whole > 0,
        torch.empty_like(whole[1:], dtype=torch.uint16),
    ]
    table = StorageTable({})
    native = state_pickler.dump(sample, records=table.records, order=table.order, remaps={}, reduce=table.reducer_override)
    return native == dump_in_python(sample, {})[0] == dump_in_python(sample, {}, short=False)[0]


def pickle_object(obj: Any) -> tuple[bytes, list[SavedStorage]]:
    data, table = dump(obj, {})
    remaps = find_remaps(table)
    if remaps:
        try:
            data, table = dump(obj, remaps)
        except _UnstableError:
            remaps = {cdata: _Remap(remap.untyped, None) for cdata, remap in remaps.items()}
            data, table = dump(obj, remaps)
        if not table.conflicts <= remaps.keys():
            raise RuntimeError(_TWO_DTYPES)
    return data, table.order
