"""What is in a sharded state: a key for each tensor and value, named as torch.distributed.checkpoint names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ckpt import torch_private
from ckpt.plan.shards import is_named_part
from ckpt.sharded.chunks import Box, LocalPart, kind_of, local_part
from ckpt.sharded.meshes import Group, MeshPlace, everywhere
from ckpt.sharded.refusals import RefusedType, RefusedValue, refuse_unreadable

# Of who writes an item. An archive is about as much beside its tensor, and a value about as much as an archive.
_ARCHIVE_BYTES = 1024
_MOST_MESHES = 64  # that are remembered
_NOT_STATEFUL = (dict, list, int, float, str, torch.Tensor, torch.nn.Parameter)  # types that need not be asked


class Entry(NamedTuple):
    """One key.

    Attributes:
        value: the tensor of this rank, or a value.
        shape: of the whole tensor; None: it is a value.
        boxes: what of it this rank holds; none of a value.
        group: the ranks that hold the same.
        nbytes: about as much as it takes in the file.
        described: what must be the same on all ranks.
    """

    value: Any
    shape: tuple[int, ...] | None
    boxes: tuple[Box, ...]
    group: Group
    nbytes: int
    described: Any
    requires_grad: bool = False


class EntryFinder:
    """Of one rank. It remembers meshes and parts from save to save, which do not change.

    Args:
        rank, world_size: of this process in the job.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._everywhere = everywhere(rank, world_size)
        self._local_of: Any = None
        self._places: dict[int, tuple[Any, MeshPlace]] = {}  # by id of the mesh, which is kept
        self._parts: dict[Any, tuple[LocalPart, Group, str]] = {}
        self._described: dict[tuple[str, torch.dtype], str] = {}
        self._texts: dict[str, str] = {}

    def find(self, state: Mapping[str, Any]) -> tuple[dict[str, Entry], dict[str, tuple[Any, ...]]]:
        """The entries by their keys, and the path of each in the state.

        Args:
            state: as resolve() gives it.

        Raises:
            TypeError: something of it cannot be saved as sharded.
            ValueError: two paths have one key; or a tensor lies on a mesh of other ranks, or has values that are not final.
        """
        try:
            flat, paths = torch_private.flatten_state_dict(dict(state))
        except ValueError as error:
            raise RefusedValue(
                f"cannot save sharded=: {error}: two places of the state have the same name for torch"
            ) from error
        kinds = _kinds()
        wrappers = torch_private.wrappers()
        self._local_of = wrappers and wrappers[1]
        with torch.no_grad():  # to_local() gives the tensor itself then
            return {key: self._entry(key, value, kinds) for key, value in flat.items()}, paths

    def _entry(self, key: str, value: Any, kinds: _Kinds) -> Entry:
        if isinstance(value, kinds.dtensor):
            return self._sharded_entry(key, value)
        if isinstance(value, kinds.sharded) or hasattr(value, "__create_write_items__") or is_named_part(value):
            raise RefusedType(_refusal(key, value))
        if not isinstance(value, torch.Tensor):
            return Entry(value, None, (), self._everywhere, _ARCHIVE_BYTES, value)
        refuse_unreadable(key, value)
        shape = tuple(value.shape)
        nbytes = value.numel() * value.itemsize + _ARCHIVE_BYTES
        origin = (0,) * len(shape)
        whole = Box(origin, shape, origin)
        return Entry(value.detach(), shape, (whole,), self._everywhere, nbytes, bare(value), value.requires_grad)

    def _sharded_entry(self, key: str, tensor: Any) -> Entry:
        mesh, shape = tensor.device_mesh, tuple(tensor.shape)
        if not torch_private.is_cut_in_order(tensor):
            raise RefusedValue(
                f"cannot save '{key}' of sharded=: it is cut over the dimensions of its mesh in another order than that of its "
                f"placements {tensor.placements}, which do not tell then what each rank holds. Redistribute it before saving"
            )
        name = (shape, id(mesh), tuple(map(kind_of, tensor.placements)))
        found = self._parts.get(name)
        if found is None:
            try:
                found = self._parts[name] = self._find_part(tensor, mesh, shape)
            except ValueError as error:
                raise RefusedValue(f"cannot save '{key}' of sharded=: {error}") from error
        part, group, described = found
        local = self._local_of(tensor)
        if (trigger := getattr(local, "trigger_wait", None)) is not None:  # the result of a collective that may be under way
            local = trigger()
        if local.requires_grad or type(local) is not torch.Tensor or local.__dict__:  # what is noted there is nobody's value
            local = local.detach()
        if tuple(local.shape) != part.shape:
            raise RefusedValue(
                f"cannot save '{key}' of sharded=: this rank holds {tuple(local.shape)} of it, where {part.shape} follows from "
                f"its shape {shape} and its placements {tensor.placements} on the {mesh}"
            )
        refuse_unreadable(key, local)
        nbytes = local.numel() * local.itemsize + _ARCHIVE_BYTES
        return Entry(local, shape, part.boxes, group, nbytes, self._describe(described, tensor.dtype), tensor.requires_grad)

    def _describe(self, part: str, dtype: torch.dtype) -> str:
        """One object for equal texts: which objects are shared shows in a pickle, and must not differ between ranks."""
        found = self._described.get((part, dtype))
        if found is None:
            text = f"{part} {dtype}"
            found = self._described[part, dtype] = self._texts.setdefault(text, text)
        return found

    def _find_part(self, tensor: Any, mesh: Any, shape: tuple[int, ...]) -> tuple[LocalPart, Group, str]:
        kept = self._places.get(id(mesh))
        if kept is None:
            if len(self._places) == _MOST_MESHES:  # somebody makes them anew each time
                self._places.clear()
                self._parts.clear()
            kept = self._places[id(mesh)] = mesh, MeshPlace(mesh, self._rank, self._world_size)
        place = kept[1]
        part = local_part(shape, tensor.placements, place.shape, place.coordinate)
        described = f"DTensor {shape} {' '.join(map(repr, tensor.placements))} {place.description}"
        return part, place.group(part.replicated), described


class _Kinds(NamedTuple):
    dtensor: type
    sharded: tuple[type, ...]


def _kinds() -> _Kinds:
    """Imported here: what is saved without them costs nothing of it."""
    from torch.distributed.tensor import DTensor

    found = torch_private.find("distributed._shard.sharded_tensor.ShardedTensor")
    return _Kinds(DTensor, (found,) if isinstance(found, type) else ())


def resolve(state: Any) -> dict[str, Any]:
    """As torch does it: what has a state dict stands for it.

    Raises:
        TypeError: it is no state dict.
    """
    if not isinstance(state, Mapping):
        raise RefusedType(f"sharded= takes a state dict (nested dicts and lists), not a {type(state).__name__}")
    return {key: value.state_dict() if is_stateful(value) else value for key, value in state.items()}


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """As it is compared: no parameter, whose class would be pickled."""
    return tensor if type(tensor) is torch.Tensor else tensor.detach()


def is_stateful(value: Any) -> bool:
    if type(value) in _NOT_STATEFUL:
        return False
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _refusal(key: str, value: Any) -> str:
    kind = type(value).__name__
    if is_named_part(value):
        return (
            f"cannot save '{key}' of sharded=: its attributes say that it is a part of another tensor, as a "
            "CheckpointableTensor of torch does; give DTensors, or use ckpt.integrations.dcp, which lets torch plan such a save"
        )
    if kind == "ShardedTensor":
        return (
            f"cannot save '{key}' of sharded=: it is a ShardedTensor, as FSDP1 makes them. Take the state by get_state_dict() "
            "of torch.distributed.checkpoint.state_dict, from a model that was wrapped with a device_mesh, which gives DTensors"
        )
    return f"cannot save '{key}' of sharded=: a {kind} says by itself what of it is saved; give DTensors, tensors or values"
