"""Reads the files of a candidate, compares them with its manifest, and unpickles them after the ranks have chosen it.

There are three ways to read a file, each in one pass that checks every byte of it:

    NewMemoryReader     to new memory, the default
    InPlaceReader       into tensors that are there, a target as for load_into()
    LentMemoryReader    to new memory, but for tensors that are lent to it

A file that all ranks need they may read together, see shared_read.py. Then that pass is a collective.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from ckpt._native import digest_file
from ckpt.directory.damage import where_damaged
from ckpt.directory.manifest import FileEntry
from ckpt.errors import CheckpointError, CorruptError, DeadlineError, DeviceError, NotACheckpointError, StorageError
from ckpt.loading.archive import Archive, Beside, reader_threads
from ckpt.loading.in_place import InPlaceRead, takes_whole
from ckpt.loading.overlap import Intervals, Pair
from ckpt.loading.record_memory import RecordMemory, fill, read_whole
from ckpt.loading.skeleton import Skeleton
from ckpt.loading.step_directory import compare
from ckpt.loading.target_match import TargetMatch
from ckpt.restore.shared_read import read_together, read_together_into

DAMAGE = (CorruptError, StorageError, DeadlineError)  # that speak against the file; all else against how it is to be loaded
UNFIT = (NotACheckpointError, *DAMAGE)  # that speak against the checkpoint

# Given the object of a file, whose tensors have no contents yet: tensors that may get these, by their paths in it.
Lend = Callable[[Any], "Mapping[tuple[Any, ...], torch.Tensor]"]


def verify(path: Path, file: FileEntry, timeout_s: float) -> None:
    """Of a file that is not to be loaded."""
    size, crc = digest_file(os.fsencode(path), reader_threads(), timeout_s)
    try:
        compare(path, file, size, crc)
    except CorruptError:
        found = where_damaged(path) if size == file.bytes else None
        if isinstance(found, DAMAGE):
            raise found from None
        raise


class NewMemoryReader:
    """A file to new memory. Making one reads no more than the directory.

    Args:
        collective: all ranks read it together, so that reading it is a collective.
        timeout_s: longest that one pass over it may take, seconds.
        beside: as of Archive.

    Attributes:
        refusal: why it cannot be loaded as asked, though the file may be good. Then only check() may be called.

    Raises:
        CorruptError, StorageError, DeadlineError: the file is damaged, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        file: FileEntry,
        map_location: Any,
        weights_only: bool,
        collective: bool,
        timeout_s: float,
        beside: Beside | None = None,
    ) -> None:
        self._path, self._file, self.collective, self._timeout_s = path, file, collective, timeout_s
        self._how = (map_location, weights_only)
        self._make: Callable[[], Any]
        self.archive = Archive(path, timeout_s, beside)
        self.directory_crc32 = self.archive.directory_crc32  # also when that is closed
        compare(path, file, self.archive.size, file.crc32)
        self.refusal: Exception | None = None

    @property
    def has_target(self) -> bool:
        """Whether reading it changes what the caller has."""
        return False

    def lent(self) -> set[int]:
        """Addresses of the tensors that were lent to it."""
        return set()

    def fill(self) -> None:
        """Reads all of it. A collective, if that is done together."""
        try:
            self._read()
        except DeviceError as error:  # the others are not to wait for this rank because of it
            self.refusal = error.with_traceback(None)
            self.check()

    def _read(self) -> None:
        if self.collective:
            contents, crc = read_together(lambda: self.archive, self._how[0])
        else:
            contents, crc = read_whole(self.archive, self._how[0])
        self._compare(crc)
        self._make = functools.partial(contents.unpickle, *self._how)

    def take(self) -> Any:
        """What the file holds. Once."""
        return self._make()

    def check(self) -> None:
        """Reads the file for its checksums alone."""
        self._compare(self.archive.fill({}, whole=True))

    def _check_first(self) -> None:
        """Nothing is unpickled whose bytes have not been checked."""
        if not self.archive.checksummed:
            verify(self._path, self._file, self._timeout_s)

    def _compare(self, crc: int | None) -> None:
        assert crc is not None
        compare(self._path, self._file, self.archive.size, crc)

    def _fill(self, pairs: list[Pair], make: Callable[[], RecordMemory]) -> None:
        reads: list[InPlaceRead] = []

        def prepare() -> tuple[Archive, Mapping[str, Any]]:
            reads.append(InPlaceRead(self.archive, pairs, make(), self.collective))
            reads[0].begin()
            return self.archive, reads[0].places

        if self.collective:
            self._compare(read_together_into(prepare).crc32)
        else:
            prepare()
            self._compare(fill(self.archive, reads[0], whole=True))
        in_place = reads.pop()
        try:
            in_place.finish()
        except DAMAGE:
            raise
        except Exception as error:  # as of a device without memory
            self.refusal = error.with_traceback(None)
        del in_place
        self.archive.close()


class InPlaceReader(NewMemoryReader):
    """
    Args:
        target, strict, weights_only: as for load_into().
        touched: the target holds parts of another checkpoint already.
    """

    def __init__(
        self,
        path: Path,
        file: FileEntry,
        target: Any,
        strict: bool,
        weights_only: bool,
        touched: bool,
        collective: bool,
        timeout_s: float,
        beside: Beside | None = None,
    ) -> None:
        super().__init__(path, file, None, weights_only, collective, timeout_s, beside)
        self._check_first()
        self._target = target
        try:
            self._lay(strict, weights_only, touched)
        except DAMAGE:
            raise
        except Exception as error:  # the others are not to wait for this rank because of it
            self.refusal = error.with_traceback(None)

    def _lay(self, strict: bool, weights_only: bool, touched: bool) -> None:
        if self.archive.byte_order() not in (None, "little"):
            raise CheckpointError(f"'{self._path}' is from a machine of another byte order: restore() it without a target")
        self._skeleton = Skeleton(self.archive, weights_only)
        self._match = TargetMatch(self._skeleton, strict)
        self._match.compare(self._skeleton.value, self._target)
        if self._match.problems:
            self.refusal = self._match.mismatch(touched)

    @property
    def has_target(self) -> bool:
        return True

    def _read(self) -> None:
        self._fill(self._match.pairs, lambda: self._match.memory(devices=not self.collective))

    def take(self) -> Any:
        """Puts the rest into the target, and returns it."""
        self._match.put_rest()
        return self._target


class LentMemoryReader(NewMemoryReader):
    """What cannot be read straight into what is lent goes to new memory, like all else. Unpickles twice."""

    def __init__(
        self,
        path: Path,
        file: FileEntry,
        lend: Lend,
        map_location: Any,
        weights_only: bool,
        collective: bool,
        timeout_s: float,
        beside: Beside | None = None,
    ) -> None:
        super().__init__(path, file, map_location, weights_only, collective, timeout_s, beside)
        self._check_first()
        self._lent: dict[tuple[Any, ...], torch.Tensor] = {}
        self._pairs: list[Pair] = []
        try:
            if self.archive.byte_order() in (None, "little"):
                self._choose(lend)
        except DAMAGE:
            raise
        except CheckpointError:  # it has no skeleton: then nothing can be lent to it
            self._lent, self._pairs = {}, []
        except Exception as error:
            self.refusal = error.with_traceback(None)

    def _choose(self, lend: Lend) -> None:
        self._skeleton = Skeleton(self.archive, self._how[1])
        match, taken, known = TargetMatch(self._skeleton, strict=True), Intervals(), set()
        for path, tensor in lend(self._skeleton.value).items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"only tensors can be lent, and {path} is a {type(tensor).__name__}")
            source = _at(self._skeleton.value, path)
            if not isinstance(_at(self._skeleton.value, path[:-1]), (MutableMapping, list)):
                continue  # nothing can be put there
            before = len(match.problems)
            match.compare(source, tensor)
            if len(match.problems) > before:
                continue
            pair = match.pairs[-1]
            place = (pair.record, tensor.data_ptr(), source.storage_offset())
            size = self.archive.records[pair.record].size
            if takes_whole(pair, size, devices=not self.collective) and (place in known or taken.add(tensor)):
                known.add(place)
                self._pairs.append(pair)
                self._lent[path] = tensor

    def _read(self) -> None:
        if not self._lent:
            return super()._read()
        for path in self._lent:
            _put(self._skeleton.value, path, None)
        needed = self._skeleton.records_of(self._skeleton.value)
        self._skeleton.value = None
        self._fill(self._pairs, functools.partial(self._allocate, needed))

    def _allocate(self, names: set[str]) -> RecordMemory:
        if self.collective:  # ranks send each other what lies on the host
            self._memory = RecordMemory(self.archive, self.archive.allocate(names))
        else:
            self._memory = RecordMemory.where_loaded(self.archive, names, self._how[0], self._skeleton.small)
        return self._memory

    @property
    def has_target(self) -> bool:
        return bool(self._lent)

    def lent(self) -> set[int]:
        return {tensor.data_ptr() for tensor in self._lent.values()}

    def take(self) -> Any:
        return self._unpickle() if self._lent else super().take()

    def _unpickle(self) -> Any:
        absent = {name: storage for name, storage in self._skeleton.storages.items() if name not in self._memory.places}
        loaded = self._memory.contents(self._skeleton.small, absent).unpickle(*self._how, is_filled=not absent)
        for path, tensor in self._lent.items():
            _put(loaded, path, tensor)
        return loaded


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(value: Any, path: tuple[Any, ...], part: Any) -> None:
    _at(value, path[:-1])[path[-1]] = part
