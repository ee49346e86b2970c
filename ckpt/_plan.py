"""From an object to what must be written: a pickle, and the storages that it names.

The pickle is the one `torch.save` makes, opcode for opcode, wherever both write whole storages. Plain strided tensors take a
short way through `reducer_override`; everything else (subclasses, sparse, quantized, nested, ...) takes torch's own
`__reduce_ex__`, whose parts come back here.

Two passes at most. The first assumes whole storages and notes which bytes of each are referenced. Only if some storage turns
out to be referenced in part, or as two dtypes, a second pass names virtual storages instead (see _views.py).
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parameter import Parameter
from torch.serialization import location_tag, normalize_storage_type
from torch.storage import TypedStorage, UntypedStorage

from ckpt._views import ByteInterval, VirtualStorages, byte_interval

COPY, LAZY, OWNED = 0, 1, 2  # as in csrc/chunk.h: enum class Source

_PROTOCOL = 2  # the only one that weights_only loading accepts in full
_rebuild_tensor_v2 = torch._utils._rebuild_tensor_v2
_rebuild_tensor_v3 = torch._utils._rebuild_tensor_v3
_rebuild_parameter = torch._utils._rebuild_parameter
_strided = torch.strided


def _storage_classes() -> dict[torch.dtype, tuple[Any, int]]:
    """For each dtype on the short way: the class that names it in the pickle (None: untyped) and its bytes per element."""
    quantized = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}
    named = torch.storage._dtype_to_storage_type_map()
    classes = {dtype: (getattr(torch, name), dtype.itemsize) for dtype, name in named.items() if dtype not in quantized}
    return classes | {dtype: (None, dtype.itemsize) for dtype in torch.storage._new_dtypes()}


_CLASSES = _storage_classes()


@dataclasses.dataclass(slots=True)
class Record:
    """One storage, or one run of it, on its way to the file as `data/<index>`."""

    storage: UntypedStorage  # held: the memory must stay
    address: int
    nbytes: int
    kind: int
    tensor: torch.Tensor | None  # one that views it, for its version counter and its name


@dataclasses.dataclass(slots=True)
class SavePlan:
    pickle: bytes
    records: list[Record]


class _Reference:
    """Stands in the pickle for a storage or a run of one; `persistent_id` turns it into torch's tuple."""

    __slots__ = ("dtype", "index", "key", "location", "nbytes", "numel", "storage", "tensor", "type", "views", "whole")

    def __init__(self, storage: UntypedStorage, index: int, location: str, dtype: Any) -> None:
        self.storage = storage
        self.index = index
        self.key = str(index)
        self.location = location
        self.dtype = dtype  # as torch tells them apart: None for untyped
        self.nbytes = storage.nbytes()
        self.whole = False  # must be written whole: a bare storage, or a tensor that covers it
        self.views: list[ByteInterval] = []
        self.tensor: torch.Tensor | None = None
        self.type: Any = UntypedStorage  # the class that names it in the pickle, and its elements of that class
        self.numel = self.nbytes


@dataclasses.dataclass(slots=True)
class _Remap:
    """What the first pass found out about one storage."""

    untyped: bool
    virtual: VirtualStorages | None  # None: write it whole


class _TorchPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, remaps: dict[int, _Remap]) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.references: dict[Any, _Reference] = {}  # storage -> reference; (storage, run) -> reference
        self.order: list[_Reference] = []
        self.conflicts: set[int] = set()  # storages seen as more than one dtype
        self._remaps = remaps

    # ---- the short way ---------------------------------------------------------------------------------------------

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            if obj.layout is _strided and obj.dtype in _CLASSES and _is_plain(obj):
                return self._reduce_tensor(obj)
        elif kind is Parameter and not obj.__dict__:
            return _rebuild_parameter, (obj.data, obj.requires_grad, OrderedDict())
        return NotImplemented

    def _reduce_tensor(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        storage = tensor.untyped_storage()
        dtype = tensor.dtype
        named, itemsize = _CLASSES[dtype]
        offset, size, stride = int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride()
        cdata = storage._cdata
        remap = self._remaps.get(cdata) if self._remaps else None
        if remap is None:
            reference = self.references.get(cdata)
            if reference is None:
                reference = self._add(cdata, storage, named and dtype, tensor)
            elif reference.dtype is not (named and dtype):
                self.conflicts.add(cdata)
            if not reference.whole:
                if offset == 0 and tensor.numel() * itemsize == reference.nbytes:
                    reference.whole = True
                else:
                    reference.views.append(byte_interval(offset, size, stride, itemsize))
        else:
            if remap.untyped:
                named = None
            reference, offset = self._find_run(remap, cdata, storage, tensor, offset)
        reference.type = named or UntypedStorage
        reference.numel = reference.nbytes // itemsize if named else reference.nbytes
        if named is None:
            return _rebuild_tensor_v3, (reference, offset, size, stride, tensor.requires_grad, OrderedDict(), dtype)
        return _rebuild_tensor_v2, (reference, offset, size, stride, tensor.requires_grad, OrderedDict())

    def _find_run(
        self, remap: _Remap, cdata: int, storage: UntypedStorage, tensor: torch.Tensor, offset: int
    ) -> tuple[_Reference, int]:
        """The reference for the run that holds the tensor, and the tensor's offset in it, in elements."""
        dtype, itemsize = tensor.dtype, tensor.dtype.itemsize
        if remap.virtual is None:
            reference = self.references.get(cdata) or self._add(cdata, storage, dtype, tensor)
            reference.whole = True
            return reference, offset
        interval = byte_interval(offset, tensor.size(), tensor.stride(), itemsize)
        run = remap.virtual.find(interval)
        key = (cdata, run)
        reference = self.references.get(key) or self._add(key, storage, dtype, tensor)
        low, high = remap.virtual.runs[run] if run >= 0 else (interval.low, interval.low)
        reference.views = [ByteInterval(low, high, 1)]
        reference.nbytes = high - low
        return reference, (interval.low - low) // itemsize

    def _add(self, key: Any, storage: UntypedStorage, dtype: Any, tensor: torch.Tensor | None) -> _Reference:
        location = "cpu" if storage.device.type == "cpu" else location_tag(storage)
        reference = _Reference(storage, len(self.order), location, dtype)
        reference.tensor = tensor
        self.references[key] = reference
        self.order.append(reference)
        return reference

    # ---- storages --------------------------------------------------------------------------------------------------

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is _Reference:
            return ("storage", obj.type, obj.key, obj.location, obj.numel)
        if kind is TypedStorage or kind is UntypedStorage or isinstance(obj, TypedStorage) or torch.is_storage(obj):
            return self._storage_id(obj)
        return None

    def _storage_id(self, obj: Any) -> tuple[Any, ...]:
        """A storage that torch's own pickling, or the user, hands us: always written whole."""
        if isinstance(obj, TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
            storage_type, numel = getattr(torch, obj._pickle_storage_type()), obj._size()
        else:
            storage, dtype = obj, None
            storage_type, numel = normalize_storage_type(type(obj)), obj.nbytes()
        cdata = storage._cdata
        reference = self.references.get(cdata)
        if reference is None:
            reference = self._add(cdata, storage, dtype, None)
        elif reference.dtype is not dtype and cdata not in self._remaps:
            self.conflicts.add(cdata)
        reference.whole = True
        return ("storage", storage_type, reference.key, reference.location, numel)


def _is_plain(tensor: torch.Tensor) -> bool:
    """No attribute, hook, lazy conjugation or nesting that torch's own pickling would have to look at."""
    return (
        (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor.is_nested
        and not tensor.__dict__
        and not tensor._backward_hooks
    )


def _find_remaps(pickler: _TorchPickler) -> dict[int, _Remap]:
    """What a second pass must do differently; empty if nothing."""
    remaps = {}
    for cdata, reference in pickler.references.items():
        untyped = cdata in pickler.conflicts
        virtual = None
        if not reference.whole:
            virtual = VirtualStorages(reference.views)
            if virtual.covers(reference.nbytes):
                virtual = None
        if untyped or virtual is not None:
            remaps[cdata] = _Remap(untyped, virtual)
    return remaps


def _dump(obj: Any, remaps: dict[int, _Remap]) -> tuple[bytes, _TorchPickler]:
    buffer = io.BytesIO()
    pickler = _TorchPickler(buffer, remaps)
    pickler.dump(obj)
    return buffer.getvalue(), pickler


def make_plan(obj: Any, is_lazy: Callable[[int], bool], eager_bytes: int) -> SavePlan:
    """Pickles `obj` and lists its storages.

    Args:
        is_lazy: whether the storage with this `_cdata` changes only behind a fence.
        eager_bytes: records of at most this many bytes are copied at once all the same.

    Raises:
        whatever pickling `obj` raises.
    """
    data, pickler = _dump(obj, {})
    remaps = _find_remaps(pickler)
    if remaps:
        data, pickler = _dump(obj, remaps)
    return SavePlan(data, [_to_record(reference, is_lazy, eager_bytes) for reference in pickler.order])


def _to_record(reference: _Reference, is_lazy: Callable[[int], bool], eager_bytes: int) -> Record:
    storage = reference.storage
    kind = LAZY if is_lazy(storage._cdata) else COPY
    if storage.device.type != "cpu":
        storage, kind = storage.cpu(), OWNED  # a private copy, made now
    low = 0 if reference.whole or not reference.views else reference.views[0].low
    nbytes = reference.nbytes
    if nbytes <= eager_bytes:
        kind = COPY
    return Record(storage, storage.data_ptr() + low if nbytes else 0, nbytes, kind, reference.tensor)
