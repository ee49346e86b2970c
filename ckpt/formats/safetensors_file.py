"""The file that `safetensors.torch.save_file` writes: a header, and behind it the bytes of a flat dict of tensors.

For the same tensors and metadata the bytes are the same. What save_file refuses is refused, before anything is written. Of a
module the file is what `save_model` writes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ckpt._native import SavedStorage
from ckpt.errors import UnsupportedError
from ckpt.formats.format import FileDescription
from ckpt.formats.shared_tensors import areas_of, find_shared, one_of_each
from ckpt.plan.lazy_storages import LazyStorages
from ckpt.plan.pickler import short_way, state_pickler
from ckpt.plan.save_plan import COPY, OWNED, SavePlan, place
from ckpt.plan.tensor_record import record_of
from ckpt.plan.views import ByteInterval
from ckpt.safetensors_header import PAIRS, RANKS, Entry, encode, in_file_order
from ckpt.safetensors_layout import METADATA

_SHOWN = 8  # groups, and names of each
_MOST_LAYOUTS = 4


class _Layout(NamedTuple):
    """Of a dict of one form: the names in the order of the file, and where in the dict they stand."""

    names: list[str]
    order: list[int]
    header: bytes


class _Layouts:
    """The newest few, by the form of what was saved: from save to save it is the same, mostly."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Any, _Layout] = {}

    def get(self, key: Any) -> _Layout | None:
        with self._lock:
            return self._kept.get(key)

    def keep(self, key: Any, layout: _Layout) -> None:
        with self._lock:
            self._kept[key] = layout
            while len(self._kept) > _MOST_LAYOUTS:
                del self._kept[next(iter(self._kept))]


_layouts = _Layouts()


class SafetensorsFile:
    """
    Args:
        target: what the file will be called, for errors.
        metadata: for its header; None: there is none.

    Raises:
        TypeError: the metadata are something else than texts by texts.
    """

    def __init__(self, target: Path, metadata: Mapping[str, str] | None = None) -> None:
        self._target = target
        self._metadata = None if metadata is None else dict(metadata)
        for key, value in (self._metadata or {}).items():
            if not (isinstance(key, str) and isinstance(value, str)):
                raise TypeError(f"metadata= takes texts by texts, not {key!r}: {value!r}; give str() or json.dumps() of it")

    def plan(self, obj: Any, lazy: LazyStorages, eager_bytes: int, device_lazy: bool | str) -> SavePlan:
        """See FileFormat.

        Raises:
            UnsupportedError: it is no flat dict of dense tensors, each with memory of its own.
        """
        given, metadata = self._of_module(obj) if isinstance(obj, torch.nn.Module) else (obj, self._metadata)
        form, records = _look_at(given)
        key = form, None if metadata is None else tuple(metadata.items())
        layout = None if form is None else _layouts.get(key)
        if layout is None:
            layout = self._lay_out(given, metadata)
            if form is not None:
                _layouts.keep(key, layout)
        if form is None:
            records, kinds = self._records_one_by_one([given[name] for name in layout.names], layout.names, eager_bytes)
        else:
            records, kinds = [records[index] for index in layout.order], bytearray(len(records))
        self._refuse_shared(layout.names, records)
        plan = SavePlan(layout.header, records, [], kinds)
        plan.named = given
        return place(plan, lazy, eager_bytes, device_lazy)

    def structure(self, obj: Any) -> SavePlan:
        """Never asked for: each rank writes a file."""
        raise NotImplementedError

    def describe(self, plan: SavePlan, target: Path, shared_token: str | None) -> FileDescription:
        """See FileFormat."""
        return FileDescription(b"", [("header", plan.pickle)], [], None, packed=True)

    # ---- what is saved ---------------------------------------------------------------------------------------------

    def _of_module(self, module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, str] | None]:
        """Its state, with one of each that share memory; what was left out stands in the metadata."""
        try:
            state, left_out = one_of_each(module.state_dict())
        except ValueError as error:
            self._refuse(str(error))
        dense = {name: _to_contiguous(value) for name, value in state.items()}
        return dense, {**left_out, **(self._metadata or {})} if left_out else self._metadata

    def _lay_out(self, obj: Any, metadata: Mapping[str, str] | None) -> _Layout:
        dtypes = self._check(obj)
        names = in_file_order(dtypes, dtypes)
        entries = [Entry(name, dtypes[name], tuple(obj[name].shape)) for name in names]
        try:
            header = encode(entries, [obj[name].numel() * dtypes[name].itemsize for name in names], metadata)
        except ValueError as error:
            self._refuse(str(error))
        places = {name: index for index, name in enumerate(obj)}
        return _Layout(names, [places[name] for name in names], header)

    def _check(self, obj: Any) -> dict[str, torch.dtype]:
        if not isinstance(obj, dict):
            self._refuse(f"it is {_kind(obj)}, not a dict")
        dtypes = {}
        for name, tensor in obj.items():
            if not isinstance(name, str) or name == METADATA:
                self._refuse(f"{name!r} is no name for a tensor there")
            if not isinstance(tensor, torch.Tensor):
                self._refuse(f"{name!r} is {_kind(tensor)}, not a tensor")
            dtypes[name] = tensor.dtype
            if tensor.dtype not in RANKS:
                self._refuse(f"{name!r} is of {tensor.dtype}, which the format does not know")
            if tensor.dtype is PAIRS and not tensor.dim():
                self._refuse(f"{name!r} has no dimension, and the format counts each of its two values: give it one")
            if tensor.layout is not torch.strided or tensor.is_nested:
                self._refuse(f"{name!r} is not dense ({tensor.layout}): give its to_dense(), or a padded tensor")
            if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
                self._refuse(f"{name!r} has no values yet: it is on the meta device, or not initialized")
            if not tensor.is_contiguous():
                self._refuse(f"{name!r} is not contiguous: give its contiguous()")
        return dtypes

    def _records_one_by_one(
        self, tensors: Sequence[torch.Tensor], names: Sequence[str], eager_bytes: int
    ) -> tuple[list[SavedStorage], bytearray]:
        records, kinds = [], bytearray()
        for name, tensor in zip(names, tensors, strict=True):
            plain = _to_plain(tensor)
            if plain is None:
                self._refuse(
                    f"{name!r} is {_kind(tensor)} without memory of its own: give a plain tensor (of a DTensor full_tensor())"
                )
            nbytes = plain.numel() * plain.dtype.itemsize
            low = int(plain.storage_offset()) * plain.dtype.itemsize
            records.append(record_of(plain, ByteInterval(low, low + nbytes, plain.dtype.itemsize)))
            is_ours = tensor.is_conj() or tensor.is_neg()
            kinds.append(OWNED if is_ours and plain.is_cpu and nbytes > eager_bytes else COPY)
        return records, kinds

    def _refuse_shared(self, names: Sequence[str], records: Sequence[SavedStorage]) -> None:
        groups = find_shared(areas_of(names, records))
        if groups:
            shown = "; ".join(", ".join(repr(area.name) for area in group[:_SHOWN]) for group in groups[:_SHOWN])
            self._refuse(
                f"some of it shares memory, which would not come back so: {shown}. Leave out all but one of each, give clones "
                "of the others, or give the module itself: then one of each is saved"
            )

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedError(
            f"cannot save to '{self._target}': a safetensors file holds a flat dict of names and tensors, and {why}. A file "
            "with another suffix (.pt) takes whatever torch.save takes"
        )


def _look_at(obj: Any) -> tuple[bytes | None, list[SavedStorage]]:
    """The form of a dict, and the memory of each tensor; None if there is something in it that must be asked for itself."""
    if type(obj) not in (dict, OrderedDict) or not short_way():
        return None, []
    found = state_pickler.read_form(obj, wrapper=None, is_value=lambda _: False)
    if found is None:
        return None, []
    form, _, tensors, records, partial, _, _ = found
    for number in partial:
        record = records[number]
        record.views = [ByteInterval(record.low, record.low + record.nbytes, tensors[number].dtype.itemsize)]
    return form, records


def _to_contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) and value.layout is torch.strided else value


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _to_plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor whose memory holds its values as they are; None of classes that wrap others, or pretend."""
    try:
        plain = tensor.detach().resolve_conj().resolve_neg()
        if type(plain) is not torch.Tensor:
            plain = plain.as_subclass(torch.Tensor)
        end = (int(plain.storage_offset()) + plain.numel()) * plain.dtype.itemsize
        there = not plain.numel() or (plain.data_ptr() != 0 and plain.untyped_storage().nbytes() >= end)
    except Exception:  # such a class may answer as it likes
        return None
    return plain if there else None
