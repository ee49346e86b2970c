"""A torch zip file: its records, and how their bytes are read. The core does that (csrc/reading), into memory of ours."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ckpt import _native
from ckpt import devices as torch_devices
from ckpt.devices import HOST
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


class Archive(Records):
    """An open file whose directory is consistent: records lie inside it, uncompressed, and do not overlap.

    Args:
        timeout_s: longest that one call may read, seconds.

    Attributes:
        records: by their names without that of the archive, as in "data.pkl" and "data/0".
        size: of the file, bytes.
        checksummed: whether it carries CRC-32s.

    Raises:
        CorruptError: it is damaged, or no torch zip file.
        StorageError: it cannot be read.
        DeadlineError: reading took too long.
    """

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
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

    def byte_order(self) -> str | None:
        """Of the numbers in it: "little", "big"; None if it does not say."""
        if "byteorder" not in self.records:
            return None
        place = self.allocate(["byteorder"])
        self.fill(place)
        return bytes_of(place["byteorder"]).decode("ascii", "replace")

    def storage_names(self) -> list[str]:
        return [name for name in self.records if name.startswith("data/")]

    def small_names(self) -> list[str]:
        """Of all others: the pickle, and a few bytes each."""
        return [name for name in self.records if not name.startswith("data/")]

    def fill(self, destinations: Mapping[str, Any], *, whole: bool = False, devices: Mapping[str, int] = _NONE) -> int | None:
        """See Records. The CRC-32 of each is checked."""
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
        self._file.check(self._wanted(filled), reader_threads())

    def check_at(self, begin: int, end: int) -> None:
        """Reads the records of which something lies in bytes begin..end of the file, and checks their CRC-32s.

        Raises:
            CorruptError, StorageError, DeadlineError: one of them is damaged, or cannot be read.
        """
        places = self.records.values()
        there = [(each.number, 0, HOST) for each in places if each.offset < end and begin < each.offset + each.size]
        self._file.read(there, whole=False, threads=reader_threads(), timeout_s=self._timeout_s)

    def claimed_crc32(self) -> int:
        """The CRC-32 that the file has if its records are what its directory says. Reads only what lies between them.

        If that is the one that a manifest has, so are the CRC-32s of all records, and of each that is read is told what of it
        has changed.
        """
        if not self.checksummed:
            return int(self._file.read([], whole=True, threads=reader_threads(), timeout_s=self._timeout_s) or 0)
        return self._file.claimed_crc32(reader_threads(), self._timeout_s)

    @property
    def directory_crc32(self) -> int:
        """Of names, places, sizes and CRC-32s of all records: what tells two files of the same layout apart."""
        return self._file.directory_crc32

    @property
    def bytes_read(self) -> int:
        """From storage, so far."""
        return self._file.bytes_read

    def counter(self) -> Callable[[], int]:
        """Says that, from any thread; also once this is closed."""
        file = self._file
        return lambda: file.bytes_read

    def _wanted(self, places: Mapping[str, Any], devices: Mapping[str, int] = _NONE) -> list[tuple[int, int, int]]:
        return [(self.records[name].number, place.data_ptr(), devices.get(name, HOST)) for name, place in places.items()]

    def close(self) -> None:
        """Lets go of the file. Nothing can be read after that."""
        del self._file
