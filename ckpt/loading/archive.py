"""A torch zip file: its records, and how their bytes are read. The core does that (csrc/reading), into memory of ours."""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ckpt import _native
from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.directory.frozen_files import IDENTITY, RECORD, FrozenReference, entry_beside
from ckpt.directory.manifest import FileEntry
from ckpt.errors import CheckpointError, CorruptError, StorageError
from ckpt.loading.host_memory import ALIGNMENT, allocate, bytes_of

TIMEOUT_S = 1800.0
_NONE: Mapping[str, int] = MappingProxyType({})  # of the records is on a device


def reader_threads() -> int:
    """They wait for the disk, and for the kernel to clear fresh pages: while some do the one, others do the other."""
    return 8


class RecordEntry(NamedTuple):
    """One entry of the file: its number in the directory, and where its bytes are."""

    number: int
    offset: int
    size: int


class Records(abc.ABC):
    """What a file holds, or several that belong together, by names, and how its bytes are read.

    Attributes:
        path: for errors.
        records: by their names.
        alignment: bytes: an address in the host's memory that suits what they hold.
    """

    alignment = ALIGNMENT
    path: Path
    records: Mapping[str, RecordEntry]

    @abc.abstractmethod
    def storage_names(self) -> list[str]:
        """Of the records that are the bytes of tensors."""

    def allocate(self, names: Iterable[str], devices: Mapping[str, int] = _NONE) -> dict[str, torch.UntypedStorage]:
        """
        Args:
            devices: of the records that are to lie on one, by name.

        Raises:
            RuntimeError: a device has not enough memory.
        """
        return {
            name: torch_devices.allocate(self.records[name].size, devices[name])
            if name in devices
            else allocate(self.records[name].size, self.records[name].offset, alignment=self.alignment)
            for name in names
        }

    @abc.abstractmethod
    def fill(self, destinations: Mapping[str, Any], *, whole: bool = False, devices: Mapping[str, int] = _NONE) -> int | None:
        """Reads records, and checks what checksums there are.

        Args:
            destinations: what has a data_ptr() and room for the record, by name.
            whole: check all of the file. Then its CRC-32 is returned.
            devices: of those destinations that lie on one, by name. They get their bytes behind what the current stream of
                the device has been given so far, and have them when this returns.

        Raises:
            DeviceError: their driver failed, or a current stream is being captured into a graph.
        """


# By its name: where the file of frozen tensors is to be found, and what a manifest says of it, if there is one.
Beside = Callable[[str], tuple[Path, "FileEntry | None"]]


class Archive(Records):
    """An open file whose directory is consistent: records lie inside it, uncompressed, and do not overlap.

    Args:
        timeout_s: longest that one call may read, seconds.
        beside: finds the file with its frozen tensors, if there is one; default: in its directory.

    Attributes:
        records: by their names without that of the archive, as in "data.pkl" and "data/0". Also those of frozen tensors that
            lie in another file, see FrozenPart: they are read as if they were here.
        size: of the file, bytes.
        checksummed: whether it carries CRC-32s.

    Raises:
        CorruptError: it is damaged, or no torch zip file.
        StorageError: it cannot be read.
        DeadlineError: reading took too long.
    """

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S, beside: Beside | None = None) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._file = _native.RecordFile(os.fsencode(path), True, reader_threads(), timeout_s)
        self.size, self.checksummed = self._file.size, self._file.checksummed
        entries = self._file.records
        prefix = entries[0][0].partition("/")[0] + "/"  # as torch finds it
        self.records = {
            name.removeprefix(prefix): RecordEntry(index, offset, size)
            for index, (name, offset, size) in enumerate(entries)
            if name.startswith(prefix)
        }
        self.frozen: FrozenPart | None = None
        if RECORD in self.records:
            content = self.read_small(RECORD)
            self.frozen = FrozenPart(path, content, beside or functools.partial(find_beside, path.parent), timeout_s)
            if twice := self.records.keys() & self.frozen.records.keys():
                raise CorruptError(
                    f"'{path}' has records that are also in its file of frozen tensors: {', '.join(sorted(twice))}"
                )
            self.records |= self.frozen.records

    def read_small(self, name: str) -> bytes:
        """A record that is not of a tensor; empty if there is none."""
        if name not in self.records:
            return b""
        place = self.allocate([name])
        self.fill(place)
        return bytes_of(place[name])

    def byte_order(self) -> str | None:
        """Of the numbers in it: "little", "big"; None if it does not say."""
        if "byteorder" not in self.records:
            return None
        return self.read_small("byteorder").decode("ascii", "replace")

    def storage_names(self) -> list[str]:
        return [name for name in self.records if name.startswith("data/")]

    def small_names(self) -> list[str]:
        """Of all others: the pickle, and a few bytes each."""
        return [name for name in self.records if not name.startswith("data/")]

    def fill(self, destinations: Mapping[str, Any], *, whole: bool = False, devices: Mapping[str, int] = _NONE) -> int | None:
        """See Records. The CRC-32 of each is checked; with `whole`, also the file of the frozen tensors, if there is one."""
        if self.frozen is not None:
            self.frozen.fill(destinations, whole, devices)
        return self._file.read(
            self._wanted(destinations, devices),
            whole=whole,
            threads=reader_threads(),
            timeout_s=self._timeout_s,
            keep=list(destinations.values()),
            driver=torch_devices.in_use.driver,
            streams=torch_devices.streams_of(set(devices.values())),
        )

    def fill_share(self, destinations: Mapping[str, Any], begin: int, end: int) -> int:
        """Reads bytes begin..end of the file, with what lies there of the records, and returns the CRC-32 of these bytes.

        Args:
            destinations: as for fill(), on the host: room for whole records. Their CRC-32s are not checked here, see check().
        """
        if self.frozen is not None:
            raise CheckpointError(f"'{self.path}' has frozen tensors in another file, and can only be read by one rank")
        return self._file.read_share(
            self._wanted(destinations),
            begin,
            end,
            threads=reader_threads(),
            timeout_s=self._timeout_s,
            keep=list(destinations.values()),
        )

    def check(self, filled: Mapping[str, Any]) -> None:
        """Checks the CRC-32s of records that are in memory of the host.

        Raises:
            CorruptError: names the first that is wrong.
        """
        if self.frozen is not None:
            self.frozen.check(filled)
        self._file.check(self._wanted(filled), reader_threads())

    def check_at(self, begin: int, end: int) -> None:
        """Reads the records of which something lies in bytes begin..end of the file, and checks their CRC-32s.

        Raises:
            CorruptError, StorageError, DeadlineError: one of them is damaged, or cannot be read.
        """
        beside = () if self.frozen is None else self.frozen.records
        places = [each for name, each in self.records.items() if name not in beside]
        there = [(each.number, 0, HOST) for each in places if each.offset < end and begin < each.offset + each.size]
        self._file.read(there, whole=False, threads=reader_threads(), timeout_s=self._timeout_s)

    def claimed_crc32(self) -> int:
        """The CRC-32 that the file has if its records are what its directory says. Reads only what lies between them.

        If that is the one that a manifest has, so are the CRC-32s of all records, and of each that is read is told what of it
        has changed.
        """
        if self.frozen is not None:
            self.frozen.compare_claimed()
        if not self.checksummed:
            return int(self._file.read([], whole=True, threads=reader_threads(), timeout_s=self._timeout_s) or 0)
        return self._file.claimed_crc32(reader_threads(), self._timeout_s)

    @property
    def directory_crc32(self) -> int:
        """Of names, places, sizes and CRC-32s of all records: what tells two files of the same layout apart."""
        return self._file.directory_crc32

    @property
    def all_bytes(self) -> int:
        """Of the file, and of that of its frozen tensors."""
        return self.size + (0 if self.frozen is None else self.frozen.size)

    @property
    def bytes_read(self) -> int:
        """From storage, so far."""
        return self.counter()()

    def counter(self) -> Callable[[], int]:
        """Says that, from any thread; also once this is closed."""
        file, frozen = self._file, None if self.frozen is None else self.frozen.counter()
        return lambda: int(file.bytes_read) + (0 if frozen is None else frozen())

    def _wanted(self, places: Mapping[str, Any], devices: Mapping[str, int] = _NONE) -> list[tuple[int, int, int]]:
        elsewhere = () if self.frozen is None else self.frozen.records
        own = ((name, place) for name, place in places.items() if name not in elsewhere)
        return [(self.records[name].number, place.data_ptr(), devices.get(name, HOST)) for name, place in own]

    def close(self) -> None:
        """Lets go of the file. Nothing can be read after that."""
        del self._file
        if self.frozen is not None:
            self.frozen.close()


def find_beside(directory: Path, name: str) -> tuple[Path, FileEntry | None]:
    """As a Beside, of a file in this directory."""
    return directory / name, entry_beside(directory, name)


class FrozenPart:
    """The frozen tensors of a file, in another one, which may be that of several steps (directory/frozen_files.py).

    Args:
        owner: the file; its path is named in errors.
        said: what that says of this one.

    Attributes:
        entry: what a manifest says of it; None: none does.
        records: by the names that they have in the file that refers to it.
        size: bytes.
        failed: whether it was this that was damaged, or could not be read.

    Raises:
        CorruptError: it is not there, or another one than is meant, or damaged.
        StorageError, CheckpointError: it cannot be read, or not by this version.
    """

    def __init__(self, owner: Path, said: bytes, beside: Beside, timeout_s: float) -> None:
        try:
            reference = FrozenReference.parse(said)
        except CheckpointError as error:
            raise type(error)(f"'{owner}': {error}") from None
        self._path, self.entry = beside(reference.file)
        self.failed = False
        if not os.path.lexists(self._path):
            raise CorruptError(
                f"'{self._path}' is missing: it holds the frozen tensors of '{owner}', which is to be copied together with it; "
                "`ckpt export` makes one file of a checkpoint"
            )
        self._archive = Archive(self._path, timeout_s, _refuse)
        self.size = self._archive.size
        if self.entry is not None and self.size != self.entry.bytes:
            raise CorruptError(f"'{self._path}' has {self.size} bytes; its manifest says {self.entry.bytes}")
        if self._archive.read_small(IDENTITY) != reference.identity.encode():
            raise CorruptError(f"'{self._path}' is another file than the one that holds the frozen tensors of '{owner}'")
        self._names = {f"data/{here}": f"data/{there}" for here, there in reference.numbers.items()}
        strangers = set(self._names.values()) - self._archive.records.keys()
        if strangers or len(set(self._names.values())) != len(self._names):
            raise CorruptError(f"'{owner}' names records of '{self._path}' that are not there, or one of them twice")
        self.records = {here: self._archive.records[there] for here, there in self._names.items()}

    def fill(self, destinations: Mapping[str, Any], whole: bool, devices: Mapping[str, int]) -> None:
        """As Archive.fill(), of those that are in here; with `whole`, compares the CRC-32 of the file with the manifest."""
        own = self._own(destinations)
        if not own and not whole:
            return
        on_devices = {self._names[name]: device for name, device in devices.items() if name in self._names}
        try:
            crc = self._archive.fill(own, whole=whole, devices=on_devices)
            self._compare(crc)
        except (CorruptError, StorageError):
            self.failed = True
            raise

    def check(self, filled: Mapping[str, Any]) -> None:
        """As Archive.check()."""
        self._archive.check(self._own(filled))

    def compare_claimed(self) -> None:
        """Whether its records are those that were committed; see Archive.claimed_crc32()."""
        if self.entry is not None:
            self._compare(self._archive.claimed_crc32())

    def _compare(self, crc: int | None) -> None:
        if crc is not None and self.entry is not None and crc != self.entry.crc32:
            raise CorruptError(f"'{self._path}' fails the CRC-32 of its manifest: its bytes have changed")

    def _own(self, places: Mapping[str, Any]) -> dict[str, Any]:
        return {self._names[name]: place for name, place in places.items() if name in self._names}

    def counter(self) -> Callable[[], int]:
        """As of Archive."""
        return self._archive.counter()

    def close(self) -> None:
        """As of Archive."""
        self._archive.close()


def _refuse(name: str) -> tuple[Path, FileEntry | None]:
    raise CorruptError(f"a file of frozen tensors refers to one more, '{name}'")
