"""From records in memory to the object that was saved, by torch's own unpickling, with errors that say what to do.

There are three ways to it. The first is the part of torch.load that comes after a file has been opened, which is given the
records (see torch_private.py). It is tried on a small object before it is relied on. If it does not do what it has to,
torch.load itself is given a file that exists only in memory (see served_file.py); if that does not go either, the path, once
all bytes have been checked.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch.serialization import default_restore_location

from ckpt.directory.frozen_files import RECORD
from ckpt.errors import CheckpointError, CorruptError
from ckpt.loading.archive import Archive, RecordEntry, Records
from ckpt.loading.host_memory import bytes_of
from ckpt.loading.served_file import MistakenError, load_served
from ckpt.loading.torch_reader import TorchReader
from ckpt.torch_private import Loader, find_loader, warn_once


class Contents:
    """All of an archive that unpickling needs, in memory and checked.

    Args:
        alone: the id() of storages that torch is not to move.
        resizable: those that a forged pickle could make larger.

    Attributes:
        storages: the bytes of tensors, by the names of their records. May be memory that is not filled yet.
    """

    def __init__(
        self,
        archive: Records,
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


class _Stay(dict[Any, Any]):
    """A map_location under which no storage moves. torch makes no tensors that wrap others where that is a function."""

    def get(self, key: Any, default: Any = None) -> Any:
        return "cpu"


STAY = _Stay()
_WRAPPED = "map_location not supported with"  # in what torch says then


def is_pretending() -> bool:
    """Whether a mode is on in which torch makes tensors of another class: those of FakeTensorMode have no memory."""
    return type(torch.empty(0)) is not torch.Tensor


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
    watched = _Watched(map_location) if _is_called(map_location) else None
    location = watched or map_location
    try:
        moves = alone and location is not STAY
        return _load(reader, _Restore(alone, location) if moves else location, location, weights_only, is_filled)
    except Exception as error:
        if isinstance(error, CheckpointError) or (watched and error is watched.raised):
            raise
        raise_explained(_cause(error), path, weights_only)
        raise  # what arbitrary objects raise, is theirs


def _load(reader: TorchReader, restore: Any, map_location: Any, weights_only: bool, is_filled: bool) -> Any:
    loader = private_loader()
    if loader is not None:
        return loader(reader, restore, weights_only, is_filled)
    if can_serve():
        restore = restore if isinstance(restore, _Restore) else _Restore(frozenset(), map_location)
        with contextlib.suppress(MistakenError):
            return load_served(reader.small, reader.storages, weights_only, restore)
    if not is_filled or RECORD in reader.small:
        raise CheckpointError(f"'{reader.path}' can only be loaded as a whole with torch {torch.__version__}: use load()")
    return torch.load(reader.path, map_location=map_location, weights_only=weights_only)


def _cause(error: Exception) -> Exception:
    """What torch.load was told, of which it makes a text on what may be done about it."""
    cause = error.__context__
    return cause if isinstance(error, pickle.UnpicklingError) and isinstance(cause, pickle.UnpicklingError) else error


# ---- trying the ways -------------------------------------------------------------------------------------------------


@functools.cache
def private_loader() -> Loader | None:
    """The first way, if it can be gone."""
    loader = find_loader()
    if loader is not None and _is_right(loader):
        return loader
    warn_once("files are read by torch.load itself, which takes longer")
    return None


@functools.cache
def can_serve() -> bool:
    """Whether the second way can be gone."""
    restore = _Restore(frozenset(), None)
    try:
        right = all(_is_sample(load_served(*_sample(), weights_only, restore)) for weights_only in (True, False))
    except Exception:
        right = False
    if not right:
        warn_once("torch.load reads each file a second time, after its checksums; nothing is loaded into what is there")
    return right


def has_skeletons() -> bool:
    """Whether an object can be made over memory that is not filled."""
    return private_loader() is not None or can_serve()


def _is_right(loader: Loader) -> bool:
    """Whether it makes of a small file what it should, over the memory that it is given, and refuses what it should."""
    try:
        return all(_loads_sample(loader, weights_only) for weights_only in (True, False)) and _refuses(loader)
    except Exception:
        return False


def _loads_sample(loader: Loader, weights_only: bool) -> bool:
    small, storages = _sample()
    found = loader(_reader(small, storages), None, weights_only, True)
    if not _is_sample(found) or found["a"].data_ptr() != storages["data/0"].data_ptr():
        return False
    return not loader.noted() and _notes_sparse(loader, weights_only)


def _notes_sparse(loader: Loader, weights_only: bool) -> bool:
    """Whether sparse tensors are where they are looked for, so that nobody looks into them too soon."""
    counts: list[int] = []

    def noted() -> list[torch.Tensor]:
        counts.append(len(loader.noted()))
        return loader.noted()

    watching = loader._replace(noted=noted)
    watching(_reader(*_records(torch.eye(2).to_sparse())), None, weights_only, False)
    return counts == [0, 1] and not loader.noted()


def _refuses(loader: Loader) -> bool:
    small, storages = _sample()
    try:
        loader(_reader({**small, "data.pkl": b"cos\ngetcwd\n)R."}, storages), None, True, True)
    except pickle.UnpicklingError:
        return not loader.noted()
    return False


def _records(value: Any) -> tuple[dict[str, bytes], dict[str, torch.UntypedStorage]]:
    file = io.BytesIO()
    torch.save(value, file)
    archive = zipfile.ZipFile(file)
    contents = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    small = {name: content for name, content in contents.items() if not name.startswith("data/")}
    storages = {
        name: torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
        for name, content in contents.items()
        if name not in small
    }
    return small, storages


def _sample() -> tuple[dict[str, bytes], dict[str, torch.UntypedStorage]]:
    numbers = torch.arange(6.0, device="cpu")
    ones = torch.ones(4, device="cpu")
    return _records(
        {"a": numbers, "b": numbers[2:5:2], "c": torch.ones_like(ones[1:], dtype=torch.int16), "d": ones > 0, "e": 5}
    )


def _is_sample(found: Any) -> bool:
    shared = found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()
    numbers = [found[name].tolist() for name in "abcd"]
    return shared and found["e"] == 5 and numbers == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0], [1] * 3, [True] * 4]


def _reader(small: dict[str, bytes], storages: dict[str, torch.UntypedStorage]) -> TorchReader:
    sizes = {name: len(content) for name, content in small.items()} | {name: each.nbytes() for name, each in storages.items()}
    records = {name: RecordEntry(number, 0, size) for number, (name, size) in enumerate(sizes.items())}
    archive: Any = SimpleNamespace(path=Path("sample"), records=records)
    return TorchReader(archive, small, storages)


# ---- errors, and where storages go -----------------------------------------------------------------------------------


def raise_explained(error: Exception, path: Path, weights_only: bool) -> None:
    """Returns if there is nothing to explain."""
    if _WRAPPED in str(error):
        raise CheckpointError(
            f"'{path}' holds tensors of a class that wraps others, which torch makes only if map_location is a device or a "
            "dict of such, and not a function. A part of a file that was saved from a device cannot be loaded then: load all"
        ) from error
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


class _Restore:
    """What torch.load does with a map_location; moves no storages which will not be returned."""

    def __init__(self, alone: Set[int], map_location: Any) -> None:
        self._alone = alone
        self._map_location = map_location

    def __call__(self, storage: Any, location: str) -> Any:
        if id(storage) in self._alone:
            return storage
        where = self._map_location
        if where is None or isinstance(where, dict):
            return default_restore_location(storage, (where or {}).get(location, location))
        if isinstance(where, (str, bytes, torch.device)):
            return default_restore_location(storage, where if isinstance(where, bytes) else str(where))
        moved = where(storage, location)
        return default_restore_location(storage, location) if moved is None else moved


def _is_called(map_location: Any) -> bool:
    return map_location is not None and not isinstance(map_location, (dict, str, bytes, torch.device))


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
