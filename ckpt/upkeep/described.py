"""What a pickle describes, as a person wants to see it: paths, and the tensor or the value that lies there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ckpt.collector import without_collector
from ckpt.upkeep.marks import mark_of
from ckpt.upkeep.pickles import Global, Made, Pairs, Stored

_MOST_VISITS = 1_000_000  # a small pickle can share containers so that its paths are without number
_MOST_SHOWN = 60  # characters of a value
_MOST_PATH = 400
_MOST_WRAPPERS = 4
_MOST_DIMENSIONS = 64  # of a tensor: what torch takes

_OF_STORAGE = {
    **{"FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "UntypedStorage": "uint8"},
    **{"ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32"},
}
_BYTES = {
    **{"float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16},
    **{"float32": 4, "int32": 4, "uint32": 4, "qint32": 4, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2},
}
# What loading of weights alone makes, or a part of that. All else would be imported, and perhaps called.
_HARMLESS = {
    *("collections.OrderedDict", "collections.Counter", "collections.defaultdict", "builtins.set", "builtins.frozenset"),
    *(
        "builtins.complex",
        "builtins.bytearray",
        "builtins.bytes",
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
    ),
    *("torch.nn.parameter.Parameter", "torch.serialization._get_layout", "pathlib.PosixPath", "pathlib.PurePosixPath"),
    *("torch.nn.parameter.Buffer", "torch._tensor._rebuild_from_type_v2", "torch.storage.UntypedStorage"),
}
_HARMLESS_BEGINNINGS = ("torch._utils._rebuild_", "torch.distributed.checkpoint.", "torch.distributed.tensor.")


class Leaf(NamedTuple):
    """
    Attributes:
        path: keys and positions, joined by dots.
        kind: "tensor", or the name of a type.
        dtype, shape, bytes: of a tensor; its own elements, whatever its storage holds.
        record: of a tensor: where its bytes are, as "data/7"; else empty.
        text: of a value: a few characters.
        mark: of a value of which these do not tell all: the same for the same value; else 0.
    """

    path: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    bytes: int = 0
    record: str = ""
    text: str = ""
    mark: int = 0


def item_bytes(dtype: str) -> int:
    return _BYTES.get(dtype, 1)


class Tree(NamedTuple):
    """
    Attributes:
        leaves: in their order.
        cut: whether there are more paths than anybody would look at.
        foreign: names of globals that a load of weights alone refuses: they would be imported, or called.
    """

    leaves: list[Leaf]
    cut: bool
    foreign: list[str]


def describe(value: Any) -> Tree:
    walk = _Walk()
    with without_collector():
        leaves = list(walk.leaves(value))
    return Tree(leaves, walk.cut, sorted(walk.foreign))


class _Walk:
    """Without recursion: what is to be walked may be nested deeper than a stack."""

    def __init__(self) -> None:
        self.cut = False
        self.foreign: set[str] = set()
        self._inside: set[int] = set()

    def leaves(self, value: Any) -> Iterator[Leaf]:
        waiting: list[tuple[str, Any]] = [("", value)]
        visits = 0
        while waiting:
            path, part = waiting.pop()
            if part is _LEFT:
                self._inside.discard(int(path))
                continue
            visits += 1
            if visits > _MOST_VISITS:
                self.cut = True
                return
            leaf, parts = self._look(path, part)
            if leaf is not None:
                yield leaf
            if parts and id(part) in self._inside:
                yield Leaf(path, "cycle")
            elif parts:
                self._inside.add(id(part))
                waiting.append((str(id(part)), _LEFT))
                waiting += [(_joined(path, key), below) for key, below in reversed(parts)]

    def _look(self, path: str, part: Any) -> tuple[Leaf | None, list[tuple[Any, Any]]]:
        """What is said of it, and the parts below."""
        if isinstance(part, Pairs):
            self._note_keys(part)
            parts = part.items()
            return (None, parts) if parts else (Leaf(path, "dict", text="{}"), [])
        if isinstance(part, (list, tuple)) and not isinstance(part, (Global, Stored)):
            parts = list(enumerate(part))
            return (None, parts) if parts else (Leaf(path, type(part).__name__, text="[]"), [])
        if isinstance(part, Made):
            return self._look_at_made(path, part)
        if isinstance(part, Global):
            self._note(part)
        return Leaf(path, _kind(part), text=shown(part), mark=mark_of(part)), []

    def _look_at_made(self, path: str, part: Made) -> tuple[Leaf | None, list[tuple[Any, Any]]]:
        self._note(part.what)
        tensor = as_tensor(part)
        if tensor is not None:
            return tensor._replace(path=path), []
        if part.name in ("collections.OrderedDict", "collections.Counter", "collections.defaultdict"):
            return (None, parts) if (parts := part.pairs.items()) else (Leaf(path, "dict", text="{}"), [])
        below = [*part.items, *_parts_of_state(part.state)]
        if part.name in _HARMLESS and not part.items:
            self._note_all(part.args)
            return Leaf(path, part.name, text=shown(part.args), mark=mark_of(part)), []
        numbered = [each if isinstance(each, _Field) else (number, each) for number, each in enumerate(below)]
        return Leaf(path, "call", text=part.name), [("()", part.args), *part.pairs.items(), *numbered]

    def _note_keys(self, pairs: Pairs) -> None:
        for key in pairs.flat[::2]:
            if isinstance(key, (Made, Global)):
                self._note(key.what if isinstance(key, Made) else key)

    def _note_all(self, args: Any) -> None:
        for each in args if isinstance(args, tuple) else ():
            if isinstance(each, (Made, Global)):
                self._note(each.what if isinstance(each, Made) else each)

    def _note(self, what: Any) -> None:
        if not isinstance(what, Global):
            self.foreign.add("a computed function")
        elif not is_harmless(what):
            self.foreign.add(str(what))


class _Field(tuple[Any, Any]):
    """Of a state: its name and value."""


_LEFT = object()


def _parts_of_state(state: Any) -> list[Any]:
    if isinstance(state, Pairs):
        return [_Field(pair) for pair in state.items()]
    return [] if state is None else [_Field(("state", state))]


def _joined(path: str, key: Any) -> str:
    text = key if isinstance(key, str) else str(key) if isinstance(key, int) and abs(key) < 1 << 64 else shown(key)
    joined = f"{path}.{text}" if path else text
    return joined if len(joined) <= _MOST_PATH else f"{joined[: _MOST_PATH // 2]}...{joined[-_MOST_PATH // 2 :]}"


def is_harmless(what: Global) -> bool:
    name = str(what).replace("__builtin__.", "builtins.", 1)  # as Python 2 called it, and old protocols still do
    if what.module == "torch":
        return what.name in _OF_STORAGE or name in _HARMLESS or is_dtype(what.name)
    return name in _HARMLESS or name.startswith(_HARMLESS_BEGINNINGS) or what.module.startswith("numpy")


def is_dtype(name: str) -> bool:
    return name in _BYTES or name in _OF_STORAGE.values() or name.startswith(("float8", "float4", "uint", "int", "bits"))


def _kind(part: Any) -> str:
    return "global" if isinstance(part, Global) else "stored" if isinstance(part, Stored) else type(part).__name__


def shown(value: Any) -> str:
    """A few characters of a value, at no cost, whatever it is."""
    if isinstance(value, (Made, Pairs, list)):
        return value.name if isinstance(value, Made) else "{...}" if isinstance(value, Pairs) else "[...]"
    if isinstance(value, Global):
        return str(value)
    if isinstance(value, Stored):
        return "stored"
    if isinstance(value, tuple):
        return "(" + ", ".join(shown(each) if not isinstance(each, tuple) else "(...)" for each in value[:8]) + ")"
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        return repr(value[:_MOST_SHOWN]) + ("..." if len(value) > _MOST_SHOWN else "")
    return repr(value)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def as_tensor(made: Made, depth: int = 0) -> Leaf | None:
    """None if it is none, or one that is not made of one storage.

    Args:
        depth: how many wrappers are around it. A pickle may nest them without end.
    """
    what, args = made.what, made.args
    if not isinstance(what, Global) or not isinstance(args, tuple) or depth > _MOST_WRAPPERS:
        return None
    if what.name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and args and isinstance(args[0], Made):
        return as_tensor(args[0], depth + 1)
    if what.name == "_rebuild_from_type_v2" and len(args) >= 3:
        return as_tensor(Made(args[0], args[2]), depth + 1)
    if what.module == "torch._utils" and what.name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_tensor"):
        return _of_storage(args)
    return None


def _of_storage(args: tuple[Any, ...]) -> Leaf | None:
    if len(args) < 4 or not isinstance(args[0], Stored) or not isinstance(args[0].id, tuple) or len(args[0].id) < 5:
        return None
    _, storage, key, _, _ = args[0].id[:5]
    shape = as_shape(args[2])
    if shape is None or not isinstance(storage, Global):
        return None
    given = args[6] if len(args) > 6 and isinstance(args[6], Global) else None
    dtype = given.name if given is not None else _OF_STORAGE.get(storage.name, storage.name)
    return Leaf("", "tensor", dtype, shape, math.prod(shape) * item_bytes(dtype), f"data/{key}")


def as_shape(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Made) and value.name == "torch.Size" and isinstance(value.args, tuple) and value.args:
        value = value.args[0]
    if (
        isinstance(value, (list, tuple))
        and len(value) <= _MOST_DIMENSIONS
        and all(isinstance(each, int) and 0 <= each < 1 << 63 for each in value)
    ):
        return tuple(value)
    return None
