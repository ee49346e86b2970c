"""Which records of a file go straight to devices: those that torch would move there from host memory."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ckpt import devices as torch_devices
from ckpt.devices import HOST

_PICKLE = "data.pkl"
_LARGEST = 16 << 20  # bytes of a pickle that is gone through for its places: the tensors of a larger one are small

Small = Mapping[str, bytes]


def devices_of(names: Iterable[str], read: Callable[[], Small], map_location: Any) -> dict[str, int]:
    """The devices of the records that torch.load would put on any, by the names of the records.

    No driver is asked if nothing is to go to a device. What is not understood has no device here: torch is to say what is
    wrong with it.

    Args:
        names: of the records of tensors.
        read: gives the records that are not of tensors.
        map_location: as in `torch.load`. If it is a function, no record is among them: such get storages of the host.

    Raises:
        what `read` raises.
    """
    if not torch_devices.are_possible() or not isinstance(map_location, (str, torch.device, dict, type(None))):
        return {}
    if isinstance(map_location, (str, torch.device)) and not str(map_location).startswith("cuda"):
        return {}
    small = read()
    if small.get("byteorder") != b"little":
        return {}  # torch swaps the bytes of such on the host
    try:
        return _devices_of(names, small, map_location)
    except Exception:
        return {}


def _devices_of(names: Iterable[str], small: Small, map_location: Any) -> dict[str, int]:
    if isinstance(map_location, (str, torch.device)):
        return _known(dict.fromkeys(names, str(map_location)))
    renamed = map_location or {}
    content = small.get(_PICKLE, b"")
    if b"cuda" not in content and not any("cuda" in str(name) for name in renamed.values()):
        return {}
    found = _locations(content)
    return _known({name: str(renamed.get(found[name], found[name])) for name in names if name in found})


def _known(places: Mapping[str, str]) -> dict[str, int]:
    indices = {place: torch_devices.index_named(place) for place in set(places.values())}
    return {name: indices[place] for name, place in places.items() if indices[place] != HOST}


def all_on_host(small: Small) -> bool:
    """Whether all that was saved lay there; False also if that cannot be told."""
    try:
        found = _locations(small.get(_PICKLE, b""))
    except Exception:
        return False
    return bool(found) and set(found.values()) == {"cpu"}


def _locations(content: bytes) -> dict[str, str]:
    """By record, where the storage lay that was saved."""
    if len(content) > _LARGEST:
        return {}
    reader = _Locations(io.BytesIO(content), encoding="utf-8")
    reader.load()
    return reader.found


class _Anything:
    """Stands for every object of a pickle and for what makes it: no code of any other class runs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def _ignore(self, *_: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Locations(pickle._Unpickler):
    """The unpickler in Python: that in C makes a memo as large as a single opcode says, which a hostile file would use.

    Without what torch never writes: objects that some extension has registered, and buffers of whatever size.
    """

    dispatch = {  # noqa: RUF012
        opcode: method
        for opcode, method in pickle._Unpickler.dispatch.items()
        if opcode not in b"".join((pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER))
    }

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.found: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _Anything

    def persistent_load(self, saved_id: Any) -> _Anything:
        kind, _, key, location, _ = (part.decode() if isinstance(part, bytes) else part for part in saved_id)
        if kind == "storage" and type(key) is type(location) is str:
            self.found[f"data/{key}"] = location
        return _Anything()
