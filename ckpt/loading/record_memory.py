"""Where records go when they are read: new memory, on the host or straight on the device where torch would put them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ckpt import devices as torch_devices
from ckpt.errors import DeviceError
from ckpt.loading import device_placement
from ckpt.loading.archive import Archive, Records
from ckpt.loading.host_memory import bytes_of
from ckpt.loading.unpickle import Contents, read_small

logger = logging.getLogger("ckpt")

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Places(Protocol):
    """
    Attributes:
        places: what has a data_ptr() and room, by the names of records.
        devices: of those that lie on one.
    """

    @property
    def places(self) -> Mapping[str, Any]: ...
    @property
    def devices(self) -> Mapping[str, int]: ...

    def retreat(self) -> None:
        """From now on all of them lie on the host."""


def fill(archive: Records, wanted: Places, more: Mapping[str, Any] = _NOTHING, *, whole: bool = False) -> int | None:
    """As Records.fill(). If the driver of devices fails, all goes by way of the host, as torch would have it.

    Raises:
        DeviceError: a current stream is being captured into a graph: a copy by torch would break that. Nothing was written.
    """
    try:
        return archive.fill({**wanted.places, **more}, whole=whole, devices=wanted.devices)
    except DeviceError as error:
        if not wanted.devices or error.capturing:
            raise
        logger.warning("'%s' is loaded by way of host memory: %s", archive.path, error)
    wanted.retreat()
    return archive.fill({**wanted.places, **more}, whole=whole)


class RecordMemory:
    """New memory for records of tensors.

    Args:
        places, devices: see Places.
    """

    def __init__(
        self, archive: Records, places: Mapping[str, torch.UntypedStorage], devices: Mapping[str, int] = _NOTHING
    ) -> None:
        self._archive = archive
        self.places = dict(places)
        self.devices = dict(devices)

    @classmethod
    def where_loaded(
        cls, archive: Archive, names: Iterable[str], map_location: Any, small: Mapping[str, bytes] | None = None
    ) -> RecordMemory:
        """Each record where torch.load would put it in the end, as far as that can be known.

        Args:
            names: of the records.
            map_location: as in `torch.load`.
            small: the records that are not of tensors, if they have been read.
        """
        names = list(names)
        devices = device_placement.devices_of(names, lambda: read_small(archive) if small is None else small, map_location)
        return cls(archive, *allocate_on(archive, names, devices))

    def retreat(self) -> None:
        self.places |= self._archive.allocate(self.devices)
        self.devices = {}

    def contents(self, small: dict[str, bytes], absent: Mapping[str, torch.UntypedStorage] = _NOTHING) -> Contents:
        """What can be unpickled.

        Args:
            absent: storages of other records, which will not be returned.
        """
        on_devices = {name: self.places[name] for name in self.devices}
        alone = torch_devices.strangers(on_devices.values()) | set(map(id, absent.values()))
        return Contents(self._archive, small, {**absent, **self.places}, alone, on_devices)


def allocate_on(
    archive: Records, names: Iterable[str], devices: Mapping[str, int]
) -> tuple[dict[str, torch.UntypedStorage], Mapping[str, int]]:
    """Memory for records, and on which devices it is: on none if one has not enough, of which torch is to tell later."""
    names = list(names)
    if devices:
        with contextlib.suppress(Exception):
            return archive.allocate(names, devices), devices
    return archive.allocate(names), _NOTHING


def sizes_alone(archive: Archive) -> dict[str, torch.UntypedStorage]:
    """Storages for map_location="meta": nobody wants the contents, but older torch asks for what has the size."""
    return {name: torch.UntypedStorage(archive.records[name].size, device="meta") for name in archive.storage_names()}


def read_whole(archive: Archive, map_location: Any = None) -> tuple[Contents, int]:
    """All records, in one pass that checks every byte; and the CRC-32 of the file."""
    to_meta = str(map_location) == "meta"
    memory = RecordMemory.where_loaded(archive, [] if to_meta else archive.storage_names(), map_location)
    small = archive.allocate(archive.small_names())
    crc = fill(archive, memory, small, whole=True)
    assert crc is not None
    if to_meta:
        memory.places = sizes_alone(archive)
    archive.close()
    return memory.contents({name: bytes_of(storage) for name, storage in small.items()}), crc
