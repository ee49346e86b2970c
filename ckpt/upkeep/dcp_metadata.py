"""`.metadata` of torch.distributed.checkpoint, read as a description: which tensors there are, and where each part lies."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ckpt.directory.dcp_directory import is_sealed
from ckpt.errors import CorruptError
from ckpt.upkeep.described import Leaf, as_shape, item_bytes, shown
from ckpt.upkeep.pickles import Global, Made, Pairs, read_pickle

Shape = tuple[int, ...]


class Part(NamedTuple):
    """Of a tensor, or a value: the archive with its bytes.

    Attributes:
        offsets, sizes: of the part in the tensor; empty for values, and for tensors of no dimension.
        file: its name.
        at, length: of the archive in that, bytes.
    """

    offsets: Shape
    sizes: Shape
    file: str
    at: int
    length: int


class Stored(NamedTuple):
    """A key. `shape` is None for a value that is no tensor."""

    key: str
    path: tuple[Any, ...]
    dtype: str
    shape: Shape | None
    parts: list[Part]


class Layout(NamedTuple):
    """`is_sealed`: it carries a checksum, and has not changed."""

    stored: list[Stored]
    file_names: list[str]
    is_sealed: bool

    def leaves(self) -> list[Leaf]:
        return [_leaf(each) for each in self.stored]


def _leaf(stored: Stored) -> Leaf:
    if stored.shape is None:
        return Leaf(stored.key, "value", text=f"{sum(part.length for part in stored.parts)} bytes")
    size = math.prod(stored.shape) * item_bytes(stored.dtype)
    count = len(stored.parts)
    return Leaf(stored.key, "tensor", stored.dtype, stored.shape, size, text="1 part" if count == 1 else f"{count} parts")


def parse(content: bytes) -> Layout:
    """
    Raises:
        CorruptError: it is no such metadata, or fails its checksum.
    """
    sealed = is_sealed(content)
    value = read_pickle(content)[0]
    fields = value.fields() if isinstance(value, Made) else {}
    keys, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(keys, Pairs):
        raise CorruptError("it is a pickle, but no metadata of torch.distributed.checkpoint")
    parts = _parts(places) if isinstance(places, Pairs) else {}
    planned = fields.get("planner_data")
    paths = planned.text_keys() if isinstance(planned, Pairs) else {}
    named = [(key if isinstance(key, str) else shown(key), said) for key, said in keys.items()]
    stored = [_stored(key, said, parts.get(key, []), paths.get(key)) for key, said in named]
    return Layout(stored, sorted({part.file for found in parts.values() for part in found}), sealed)


def _parts(places: Pairs) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for index, info in places.items():
        said, where = _fields(index), _fields(info)
        key, file = said.get("fqn"), where.get("relative_path")
        at, length = where.get("offset"), where.get("length")
        if not (isinstance(key, str) and isinstance(file, str) and isinstance(at, int) and isinstance(length, int)):
            raise CorruptError(f"its place of {shown(key)} cannot be understood")
        if "/" in file or "\0" in file or file in ("", ".", "..") or at < 0 or length < 0:
            raise CorruptError(f"its place of {shown(key)} is outside of the directory")
        found.setdefault(key, []).append(Part(as_shape(said.get("offset")) or (), (), file, at, length))
    return found


def _fields(value: Any) -> dict[str, Any]:
    return value.fields() if isinstance(value, Made) else {}


def _stored(key: str, said: Any, parts: list[Part], path: Any) -> Stored:
    own_path = path if isinstance(path, tuple) else (key,)
    fields = _fields(said)
    shape = as_shape(fields.get("size"))
    if shape is None:
        return Stored(key, own_path, "", None, parts)
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, Made) else None
    dtype = state[0] if isinstance(state, tuple) and state else _fields(properties).get("dtype")
    chunks = {}
    for chunk in fields.get("chunks") or ():
        offsets, sizes = as_shape(_fields(chunk).get("offsets")), as_shape(_fields(chunk).get("sizes"))
        if offsets is None or sizes is None:
            raise CorruptError(f"its parts of '{key}' cannot be understood")
        chunks[offsets] = sizes
    sized = [part._replace(sizes=chunks.get(part.offsets, ())) for part in parts]
    return Stored(key, own_path, dtype.name if isinstance(dtype, Global) else "unknown", shape, sized)
