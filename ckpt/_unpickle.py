"""From records in memory to the object that was saved, by torch's own unpickling, with errors that say what to do."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from ckpt._archive import Archive, TorchReader, bytes_of
from ckpt.errors import CheckpointError, CorruptError


class Contents:
    """All of an archive that unpickling needs, in memory and checked.

    Args:
        alone: addresses (_cdata) of storages that torch is not to move.
        resizable: those that a forged pickle could make larger.

    Attributes:
        storages: the bytes of tensors, by the names of their records. May be memory that is not filled yet.
    """

    def __init__(
        self,
        archive: Archive,
        small: dict[str, bytes],
        storages: dict[str, torch.UntypedStorage],
        alone: Set[int] = frozenset(),
        resizable: Mapping[str, torch.UntypedStorage] = MappingProxyType({}),
    ) -> None:
        self.archive = archive
        self.storages = storages
        self._small = small
        self._alone = alone
        self._resizable = resizable

    def unpickle(self, map_location: Any, weights_only: bool, *, is_filled: bool = True) -> Any:
        """As torch.load does it. Once only: the storages become those of the result.

        Args:
            is_filled: False: the storages have no contents yet, which is not to be held against them.

        Raises:
            CheckpointError: it holds objects that weights_only refuses, or torch cannot make it.
            CorruptError: the pickle is none, or asks for what is not there.
        """
        reader = TorchReader(self.archive, self._small, self.storages)
        loaded = unpickle(reader, self.archive.path, map_location, weights_only, self._alone, is_filled=is_filled)
        for name, storage in self._resizable.items():
            if storage.nbytes() != self.archive.records[name].size:
                raise CorruptError(f"a tensor in '{self.archive.path}' reaches beyond the end of record '{name}'")
        return loaded


def read_small(archive: Archive) -> dict[str, bytes]:
    """The pickle and its companions."""
    places = archive.allocate(archive.small_names())
    archive.fill(places)
    return {name: bytes_of(storage) for name, storage in places.items()}


def only_weights(asked: bool) -> bool:
    """torch.load lets the environment forbid all but weights."""
    forced = os.getenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true")
    return asked or forced


def unpickle(
    reader: TorchReader,
    path: Path,
    map_location: Any,
    weights_only: bool,
    alone: Set[int] = frozenset(),
    *,
    is_filled: bool = True,
) -> Any:
    """What torch.load does once it has opened the file."""
    weights_only = only_weights(weights_only)
    module: Any = torch._weights_only_unpickler if weights_only else pickle
    module = module if is_filled else _without_validation(module)
    location = _Watched(map_location) if _is_called(map_location) else map_location
    try:
        return torch.serialization._load(reader, _LeaveAlone(alone, location) if alone else location, module, encoding="utf-8")
    except Exception as error:
        torch._utils._sparse_tensors_to_validate.clear()  # or the next load would trip over what this one has left there
        if isinstance(error, CheckpointError) or (isinstance(location, _Watched) and error is location.raised):
            raise
        raise_explained(error, path, weights_only)
        raise  # what arbitrary objects raise, is theirs


def _without_validation(module: Any) -> Any:
    """For torch.serialization: an unpickler that lets nobody look into the sparse tensors that it makes.

    torch before 2.7 always does, later ones if `torch.sparse.check_sparse_tensor_invariants` is on.
    """

    class Unpickler(module.Unpickler):
        def load(self) -> Any:
            noted = torch._utils._sparse_tensors_to_validate
            before = len(noted)
            try:
                return super().load()
            finally:
                del noted[before:]

    return SimpleNamespace(Unpickler=Unpickler)


def raise_explained(error: Exception, path: Path, weights_only: bool) -> None:
    """Returns if there is nothing to explain."""
    if isinstance(error, pickle.UnpicklingError) and weights_only:
        raise CheckpointError(
            f"'{path}' holds objects that weights_only loading refuses ({first_line(error)}); if you trust the file, pass "
            "weights_only=False, which can run any code in it"
        ) from error
    if isinstance(error, pickle.UnpicklingError):
        raise CorruptError(f"'{path}' is not a torch file, or damaged: {first_line(error)}") from error
    if isinstance(error, EOFError):
        raise CorruptError(f"'{path}' is not a torch file, or cut off") from error
    if weights_only:
        raise CheckpointError(f"'{path}' cannot be loaded: {type(error).__name__}: {first_line(error)}") from error


class _Watched:
    """A map_location of the caller's own making: what it raises is passed on as it is."""

    def __init__(self, call: Callable[[Any, str], Any]) -> None:
        self._call = call
        self.raised: Exception | None = None

    def __call__(self, storage: Any, location: str) -> Any:
        try:
            return self._call(storage, location)
        except Exception as error:
            self.raised = error
            raise


class _LeaveAlone:
    """A map_location that moves no storages which will not be returned."""

    def __init__(self, alone: Set[int], map_location: Any) -> None:
        self._alone = alone
        self._restore = torch.serialization._get_restore_location(map_location)

    def __call__(self, storage: Any, location: str) -> Any:
        return storage if storage._cdata in self._alone else self._restore(storage, location)


def _is_called(map_location: Any) -> bool:
    return map_location is not None and not isinstance(map_location, (dict, str, bytes, torch.device))


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
