"""The shape of a saved object before its bytes are read: what lies where, and which records belong to it.

A skeleton is the object itself, unpickled over memory that has not been filled, nor touched. So its tensors have their dtypes,
shapes, strides and shared storages, and cost nothing but Python objects.
"""

from __future__ import annotations

import mmap
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch

from ckpt.errors import CheckpointError
from ckpt.loading.archive import Archive, RecordEntry, Records
from ckpt.loading.host_memory import allocate, fixed
from ckpt.loading.unpickle import STAY, Contents, can_serve, is_pretending, private_loader, read_small
from ckpt.torch_private import key_of

PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.layout, torch.Size)


class Skeleton:
    """
    Attributes:
        value: the object.
        small: the records that are not of tensors.

    Raises:
        CheckpointError: it cannot be unpickled, see Contents.unpickle().
    """

    def __init__(self, archive: Archive, weights_only: bool) -> None:
        refuse_pretending(archive.path)
        self.small = read_small(archive)
        self._lay_out(archive)
        self.value = self._unpickle(weights_only)

    def _lay_out(self, archive: Records) -> None:
        self.archive = archive
        self.storages = {name: _untouched(archive.records[name]) for name in archive.storage_names()}
        self._names = {key_of(storage): name for name, storage in self.storages.items()}

        # Any of those without bytes: torch may have made storages of its own for these.
        self._empty = next((name for name in self.storages if archive.records[name].size == 0), None)

    def _unpickle(self, weights_only: bool) -> Any:
        contents = Contents(self.archive, self.small, self.storages)
        try:
            return contents.unpickle(STAY, weights_only, is_filled=False)
        except Exception:
            if private_loader() is not None or not can_serve():
                raise
        self.archive.fill(self.storages)  # torch.load looks into sparse tensors
        return contents.unpickle(STAY, weights_only)

    def record_of(self, tensor: torch.Tensor) -> str | None:
        """The record that holds the bytes of a plain tensor; None for all others."""
        if not is_plain_tensor(tensor):
            return None
        storage = tensor.untyped_storage()
        return self._names.get(key_of(storage)) or (None if storage.nbytes() else self._empty)

    def records_of(self, value: Any) -> set[str]:
        """All records that the parts of a value need; every one, if it has parts that cannot be looked into."""
        needed: set[str] = set()
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, PLAIN) or id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, torch.Tensor) and (name := self.record_of(part)) is not None:
                needed.add(name)
            elif type(part) in (dict, OrderedDict, Counter):
                waiting += [*part.keys(), *part.values(), vars(part) if type(part) is OrderedDict else None]
            elif type(part) in (list, tuple, set, frozenset):
                waiting += part
            else:
                return set(self.storages)
        return needed


def refuse_pretending(path: Path) -> None:
    """
    Raises:
        CheckpointError: tensors have no memory just now.
    """
    if is_pretending():
        raise CheckpointError(
            f"'{path}' cannot be read into what is there while FakeTensorMode or the like is on: leave the mode first"
        )


def _untouched(record: RecordEntry) -> torch.UntypedStorage:
    """Memory for it. What is small is cleared, because unpickling may look into it; the rest are pages that read as zeros."""
    if record.size < mmap.PAGESIZE:
        return fixed(torch.zeros(record.size, dtype=torch.uint8, device="cpu").untyped_storage())
    return allocate(record.size, record.offset, large=mmap.PAGESIZE)


def view_of(source: torch.Tensor, filled: torch.Tensor | torch.UntypedStorage) -> torch.Tensor:
    """The tensor that `source` is in the skeleton, over memory that holds the record."""
    whole, rest = 0, 0
    if isinstance(filled, torch.Tensor):
        whole, rest = divmod(int(filled.storage_offset()) * filled.itemsize, source.itemsize)
    if rest:  # a record of several dtypes, filled into a tensor that stands askew for this one
        assert isinstance(filled, torch.Tensor)
        filled, whole = filled.clone(memory_format=torch.preserve_format), 0
    storage = filled.untyped_storage() if isinstance(filled, torch.Tensor) else filled
    return torch.empty(0, dtype=source.dtype, device=storage.device).set_(
        storage, whole + source.storage_offset(), source.shape, source.stride()
    )


def is_plain_tensor(value: Any) -> bool:
    """One whose elements are bytes of one storage, and nothing else."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_nested
        and not value.is_conj()
        and not value.is_neg()
        and not vars(value)
    )
