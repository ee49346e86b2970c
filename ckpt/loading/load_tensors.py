"""Safetensors files as an object: what load() returns of one, and its shape before its bytes are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import default_restore_location

from ckpt.loading import device_placement
from ckpt.loading.record_memory import RecordMemory, allocate_on, fill
from ckpt.loading.selection import Selection
from ckpt.loading.skeleton import Skeleton, refuse_pretending
from ckpt.loading.tensor_files import TensorFiles, view_as
from ckpt.loading.unpickle import is_pretending

_LITTLE = {"byteorder": b"little"}  # as the format has it


def load_tensors(path: Path, map_location: Any, selection: Selection | None, timeout_s: float) -> dict[str, torch.Tensor]:
    """As load(): a dict, in the order of the file."""
    files = TensorFiles(path, timeout_s)
    names = list(files.tensors)
    if selection is not None:
        names = list(selection.prune(dict.fromkeys(names), path))
    location = map_location.get("cpu", "cpu") if isinstance(map_location, Mapping) else map_location
    if str(location) == "meta" or is_pretending():
        where = location if isinstance(location, (str, torch.device)) else "cpu"
        return {name: torch.empty(files.tensors[name].shape, dtype=files.tensors[name].dtype, device=where) for name in names}
    devices = device_placement.devices_of(names, lambda: _LITTLE, location)
    memory = RecordMemory(files, *allocate_on(files, names, devices))
    fill(files, memory)
    moved = {name: each if name in memory.devices else _move(each, location) for name, each in memory.places.items()}
    return {name: view_as(moved[name], files.tensors[name]) for name in names}


def _move(storage: torch.UntypedStorage, location: Any) -> torch.UntypedStorage:
    """As torch.load does it with a storage that was saved from the host."""
    if location is None or str(location) == "cpu":
        return storage
    if callable(location):
        given = location(storage, "cpu")
        return storage if given is None else given
    return default_restore_location(storage, str(location))


class TensorSkeleton(Skeleton):
    """See Skeleton. Nothing is unpickled."""

    def __init__(self, files: TensorFiles) -> None:
        refuse_pretending(files.path)
        self.small = {}
        self._lay_out(files)
        self.value = {name: view_as(self.storages[name], each) for name, each in files.tensors.items()}

    def add_tied(self, target: Any) -> None:
        """Adds the names that the file lacks because their tensors share memory with others, here as where it was saved:
        `save_model` leaves them out."""
        named = target.state_dict() if isinstance(target, torch.nn.Module) else target
        if not isinstance(named, Mapping):
            return
        places = {name: place for name, value in named.items() if (place := _place_of(value)) is not None}
        saved = {place: name for name, place in places.items() if name in self.value}
        for name, place in places.items():
            if name not in self.value and place in saved:
                self.value[name] = self.value[saved[place]]


def _place_of(value: Any) -> tuple[Any, ...] | None:
    """What two tensors have in common that are the same in memory; None if there is none."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided or not value.numel():
        return None
    return (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.data_ptr() else None
