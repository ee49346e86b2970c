"""The shape of a saved object before its bytes are read: what lies where, and which records belong to it.

An outline is the object itself, unpickled over memory that has not been filled, nor touched. So its tensors have their dtypes,
shapes, strides and shared storages, and cost nothing but Python objects.
"""

from __future__ import annotations

import fnmatch
import mmap
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ckpt.errors import CheckpointError
from ckpt.loading.archive import Archive, Record, allocate, fixed
from ckpt.loading.unpickle import STAY, Contents, can_serve, is_pretending, private_loader, read_small
from ckpt.torch_private import key_of

_MOST_VISITS = 1_000_000  # of values: a small pickle can share containers so that its paths are without number
_SHOWN_PATHS = 8
PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.layout, torch.Size)


class Outline:
    """
    Attributes:
        value: the object.
        small: the records that are not of tensors.

    Raises:
        CheckpointError: it cannot be unpickled, see Contents.unpickle().
    """

    def __init__(self, archive: Archive, weights_only: bool) -> None:
        if is_pretending():
            raise CheckpointError(
                f"'{archive.path}' cannot be read into what is there while FakeTensorMode or the like is on: leave the mode "
                "first"
            )
        self.archive = archive
        self.small = read_small(archive)
        self.storages = {name: _untouched(archive.records[name]) for name in archive.storage_names()}
        self.value = self._unpickle(weights_only)
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


def _untouched(record: Record) -> torch.UntypedStorage:
    """Memory for it. What is small is cleared, because unpickling may look into it; the rest are pages that read as zeros."""
    if record.size < mmap.PAGESIZE:
        return fixed(torch.zeros(record.size, dtype=torch.uint8, device="cpu").untyped_storage())
    return allocate(record.size, record.offset, large=mmap.PAGESIZE)


def view_of(source: torch.Tensor, filled: torch.Tensor | torch.UntypedStorage) -> torch.Tensor:
    """The tensor that `source` is in the outline, over memory that holds the record."""
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


def unfold(value: Any) -> list[tuple[Any, Any]] | None:
    """(key, part) of what has parts with keys or numbers; None for everything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return list(enumerate(value))
    return None


_NOTHING = object()


class Selection:
    """Which parts of an object are wanted: patterns over dotted paths, as in "model.layers.0.*".

    A path joins the keys of dicts and the positions in lists and tuples. "*" stands for any characters, dots too, "?" for one,
    "[ab]" for one of these; what matches is taken with all that is below it.

    Raises:
        TypeError, ValueError: the patterns are not texts, or there are none.
    """

    def __init__(self, keys: str | Sequence[str]) -> None:
        patterns = [keys] if isinstance(keys, str) else list(keys)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"keys must be a pattern or a list of patterns, not {keys!r}")
        if not patterns:
            raise ValueError("keys must name something; leave it out to load all")
        self._patterns = {pattern: re.compile(fnmatch.translate(pattern)) for pattern in patterns}
        self._unmatched: set[str] = set()
        self._paths: list[str] = []
        self._visits = 0

    def prune(self, value: Any, where: object) -> Any:
        """A copy of the containers with just what is wanted; in lists and tuples None stands for what is not.

        Raises:
            CheckpointError: a pattern matches nothing in `where`.
        """
        self._unmatched, self._paths, self._visits = set(self._patterns), [], 0
        pruned = self._prune(value, "", ())
        if self._unmatched:
            raise CheckpointError(
                f"'{where}' holds nothing that {sorted(self._unmatched)} match{'es' * (len(self._unmatched) == 1)}; its first "
                f"paths are {self._paths}"
            )
        return pruned

    def _prune(self, value: Any, path: str, inside: tuple[int, ...]) -> Any:
        self._visits += 1
        if self._visits > _MOST_VISITS:
            raise CheckpointError("this object has too many paths to choose from: load all of it")
        if path and self._is_wanted(path):
            return value
        parts = unfold(value)
        if parts is None or id(value) in inside:
            if len(self._paths) < _SHOWN_PATHS:
                self._paths.append(path)
            return _NOTHING
        inside = (*inside, id(value))
        kept = [(key, self._prune(part, f"{path}.{key}" if path else str(key), inside)) for key, part in parts]
        if all(part is _NOTHING for _, part in kept):
            return _NOTHING
        return _fold(value, kept)

    def _is_wanted(self, path: str) -> bool:
        matching = {pattern for pattern, compiled in self._patterns.items() if compiled.match(path)}
        self._unmatched -= matching
        return bool(matching)


def _fold(value: Any, kept: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, Mapping):
        parts = {key: part for key, part in kept if part is not _NOTHING}
        return OrderedDict(parts) if isinstance(value, OrderedDict) else parts
    items: list[Any] = [None if part is _NOTHING else part for _, part in kept]
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return items
