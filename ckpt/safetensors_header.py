"""The header of a safetensors file, which says of each tensor its dtype, its shape, and where behind the header its bytes lie.

    8 bytes     length of the text, little-endian
    text        JSON: {"__metadata__": {text: text, ...},
                       name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...},
                with spaces behind it up to a multiple of 8 bytes
    the rest    the tensors' bytes, one behind the other, without gaps

The library `safetensors` writes tensors by descending rank of their dtype, then by name, and refuses what has gaps. So do we.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

# Of the text, bytes: the library refuses longer ones.
LONGEST = 100_000_000
LENGTH_BYTES = 8
_ALIGNMENT = 8
METADATA = "__metadata__"
_MOST_DIMENSIONS = 64  # that torch can do anything with
_LONGEST_SHOWN = 100  # characters of what a file says, in errors

# In the order in which the library writes them. Of torch's name for it and the one in the file; an older torch may lack some.
_NAMES = (
    ("uint64", "U64"),
    ("int64", "I64"),
    ("float64", "F64"),
    ("complex64", "C64"),
    ("float32", "F32"),
    ("uint32", "U32"),
    ("int32", "I32"),
    ("bfloat16", "BF16"),
    ("float16", "F16"),
    ("uint16", "U16"),
    ("int16", "I16"),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ"),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ"),
    ("float8_e8m0fnu", "F8_E8M0"),
    ("float8_e4m3fn", "F8_E4M3"),
    ("float8_e5m2", "F8_E5M2"),
    ("int8", "I8"),
    ("uint8", "U8"),
    ("float4_e2m1fn_x2", "F4"),
    ("bool", "BOOL"),
)
_KNOWN = [(getattr(torch, name), code) for name, code in _NAMES if hasattr(torch, name)]
RANKS: Mapping[torch.dtype, int] = {dtype: rank for rank, (dtype, _) in enumerate(_KNOWN)}  # the lowest comes first
CODES: Mapping[torch.dtype, str] = dict(_KNOWN)
DTYPES: Mapping[str, torch.dtype] = {code: dtype for dtype, code in _KNOWN}
PAIRS = getattr(torch, "float4_e2m1fn_x2", None)  # two values are one element here, and two in the file

_quote = json.JSONEncoder(ensure_ascii=False).encode


class Entry(NamedTuple):
    """A tensor of the file. `shape` is that of the tensor in torch."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def in_file_order(names: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """
    Args:
        dtypes: of each name; all are in RANKS.
    """
    return sorted(sorted(names), key=lambda name: RANKS[dtypes[name]])


def encode(entries: Iterable[Entry], sizes: Iterable[int], metadata: Mapping[str, str] | None) -> bytes:
    """All of the file but the bytes of the tensors: its length and its text.

    Args:
        entries: in the order of the file.
        sizes: of each, bytes.
        metadata: None: there is none. Else it stands there in this order.

    Raises:
        ValueError: it would be longer than readers take, or a text has half of a surrogate pair, which is no Unicode.
    """
    parts = [] if metadata is None else [f"{_quote(METADATA)}:{_as_object(metadata)}"]
    end = 0
    for (name, dtype, shape), size in zip(entries, sizes, strict=True):
        begin, end = end, end + size
        numbers = ",".join(map(str, _as_written(dtype, shape)))
        parts.append(f'{_quote(name)}:{{"dtype":"{CODES[dtype]}","shape":[{numbers}],"data_offsets":[{begin},{end}]}}')
    try:
        text = f"{{{','.join(parts)}}}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a name or the metadata has half of a surrogate pair, which UTF-8 cannot hold: {error}") from None
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LONGEST:
        raise ValueError(
            f"its header would have {len(text)} bytes, and readers take no more than {LONGEST}: save fewer tensors"
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _as_object(texts: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{_quote(key)}:{_quote(value)}" for key, value in texts.items()) + "}"


def _as_written(dtype: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 2 * shape[-1]) if dtype is PAIRS else shape


# ---- reading ---------------------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """A tensor, and which bytes behind the header are its."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def length_of(start: bytes, file_bytes: int) -> int:
    """How long the text is.

    Args:
        start: of the file, LENGTH_BYTES of it.
        file_bytes: all that it has.

    Raises:
        ValueError: it is too long.
    """
    length = int.from_bytes(start, "little")
    if length > LONGEST:
        raise ValueError(f"its header would have {length} bytes, and may have no more than {LONGEST}")
    if LENGTH_BYTES + length > file_bytes:
        raise ValueError(f"its header ends at byte {LENGTH_BYTES + length}, and the file has {file_bytes}: it is truncated")
    return length


def decode(text: bytes, data_bytes: int) -> tuple[list[Placed], dict[str, str]]:
    """The tensors, in the order in which they lie in the file, and the metadata.

    Args:
        data_bytes: that lie behind the header.

    Raises:
        ValueError: it is no header, or one of another file; says what is wrong.
    """
    fields = _parse(text)
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its {METADATA} are not texts by texts")
    placed = sorted((_placed(name, entry) for name, entry in fields.items()), key=lambda each: (each.begin, each.end))
    end, last = 0, "the header"
    for each in placed:
        if each.begin != end:
            what = "lies over" if each.begin < end else "leaves a hole behind"
            raise ValueError(f"{_short(each.name)} {what} {last}: it begins at byte {each.begin}, and should at {end}")
        end, last = each.end, _short(each.name)
    if end != data_bytes:
        less = "it is truncated" if end > data_bytes else "there is more than the header tells of"
        raise ValueError(f"its tensors have {end} bytes, and {data_bytes} lie behind the header: {less}")
    return placed, metadata


def _parse(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with '{'")
    try:
        return dict(json.loads(text.decode(), object_pairs_hook=_without_twins, parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON that safetensors have: {error}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twin, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{_short(twin)} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _placed(name: str, entry: Any) -> Placed:
    shown = _short(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} has not just a dtype, a shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(f"the dtype of {shown} is {_short(code)}, which this version of ckpt, or of torch, does not know")
    if not _are_sizes(shape, _MOST_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the shape {_short(shape)} or the data_offsets {_short(offsets)} of {shown} are no such")
    in_torch = _in_torch(shown, dtype, shape)
    nbytes, (begin, end) = math.prod(in_torch) * dtype.itemsize, offsets
    if nbytes != end - begin:
        raise ValueError(f"{shown} has {end - begin} bytes, and should have {nbytes}: it is {code} of shape {shape}")
    return Placed(name, dtype, in_torch, begin, end)


def _in_torch(shown: str, dtype: torch.dtype, shape: list[int]) -> tuple[int, ...]:
    if dtype is not PAIRS:
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise ValueError(f"{shown} is F4 of shape {shape}, and torch has these by twos")
    return (*shape[:-1], shape[-1] // 2)


def _are_sizes(numbers: Any, most: int) -> bool:
    plain = isinstance(numbers, list) and len(numbers) <= most
    return plain and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
