"""Which records of a file go straight to devices: those that torch would move there from host memory."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ckpt import _devices
from ckpt._devices import HOST

_PICKLE = "data.pkl"


def devices_of(names: Iterable[str], small: Mapping[str, bytes], map_location: Any) -> dict[str, int]:
    """The devices of the records that torch.load would put on any, by the names of the records.

    Args:
        names: of the records of tensors.
        small: the records that are not of tensors.
        map_location: as in `torch.load`. If it is a function, no record is among them: such get storages of the host.
    """
    if small.get("byteorder", b"little") != b"little":
        return {}  # torch swaps the bytes of such on the host
    if isinstance(map_location, (str, torch.device)):
        return _known(dict.fromkeys(names, str(map_location)))
    if not isinstance(map_location, (dict, type(None))):
        return {}
    renamed = map_location or {}
    content = small.get(_PICKLE, b"")
    if b"cuda" not in content and not any("cuda" in str(name) for name in renamed.values()):
        return {}
    found = _locations(content)
    return _known({name: str(renamed.get(found[name], found[name])) for name in names if name in found})


def _known(places: Mapping[str, str]) -> dict[str, int]:
    indices = {place: _devices.index_named(place) for place in set(places.values())}
    return {name: indices[place] for name, place in places.items() if indices[place] != HOST}


def _locations(content: bytes) -> dict[str, str]:
    """By record, where the storage lay that was saved; nothing if the pickle is not understood."""
    reader = _Locations(io.BytesIO(content), encoding="utf-8")
    try:
        reader.load()
    except Exception:  # unpickling proper will say what is wrong with it
        return {}
    return reader.found


class _Anything:
    """Stands for every object of a pickle and for what makes it: no code of any other class runs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def _ignore(self, *_: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Locations(pickle.Unpickler):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.found: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _Anything

    def persistent_load(self, saved_id: Any) -> _Anything:
        kind, _, key, location, _ = (part.decode() if isinstance(part, bytes) else part for part in saved_id)
        if kind == "storage":
            self.found[f"data/{key}"] = location
        return _Anything()
