"""Reads the header of a safetensors file, which may have been made to do harm: what it says of each tensor, or why it is none.

    8 bytes     length of the text, little-endian
    text        JSON: {"__metadata__": {text: text, ...},
                       name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...},
                with spaces behind it up to a multiple of 8 bytes
    the rest    the tensors' bytes, one behind the other, without gaps

Needs no torch: what the dtypes are there, safetensors_header.py says.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

# Of the text, bytes: the library `safetensors` refuses longer ones.
LONGEST = 100_000_000
LENGTH_BYTES = 8
METADATA = "__metadata__"
_MOST_DIMENSIONS = 64  # that torch can do anything with
_LONGEST_SHOWN = 100  # characters of what a file says, in errors


class Kind(NamedTuple):
    """Of elements: what torch calls it, and how many bits the file has for one."""

    name: str
    bits: int


FOUR_BITS = "F4"  # of these torch has two in one element
# By their names in the file, in the order in which the library writes them.
KINDS: Mapping[str, Kind] = {
    "U64": Kind("uint64", 64),
    "I64": Kind("int64", 64),
    "F64": Kind("float64", 64),
    "C64": Kind("complex64", 64),
    "F32": Kind("float32", 32),
    "U32": Kind("uint32", 32),
    "I32": Kind("int32", 32),
    "BF16": Kind("bfloat16", 16),
    "F16": Kind("float16", 16),
    "U16": Kind("uint16", 16),
    "I16": Kind("int16", 16),
    "F8_E5M2FNUZ": Kind("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": Kind("float8_e4m3fnuz", 8),
    "F8_E8M0": Kind("float8_e8m0fnu", 8),
    "F8_E4M3": Kind("float8_e4m3fn", 8),
    "F8_E5M2": Kind("float8_e5m2", 8),
    "I8": Kind("int8", 8),
    "U8": Kind("uint8", 8),
    FOUR_BITS: Kind("float4_e2m1fn_x2", 4),
    "BOOL": Kind("bool", 8),
}


class Span(NamedTuple):
    """A tensor, and which bytes behind the header are its.

    Attributes:
        code: one of KINDS.
        shape: as torch has it, where two elements of four bits are one.
    """

    name: str
    code: str
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


def parse(text: bytes, data_bytes: int) -> tuple[list[Span], dict[str, str]]:
    """The tensors, in the order in which they lie in the file, and the metadata.

    Args:
        data_bytes: that lie behind the header.

    Raises:
        ValueError: it is no header, or one of another file; says what is wrong.
    """
    fields = _fields(text)
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its {METADATA} are not texts by texts")
    spans = sorted((_span(name, entry) for name, entry in fields.items()), key=lambda each: (each.begin, each.end))
    end, last = 0, "the header"
    for each in spans:
        if each.begin != end:
            what = "lies over" if each.begin < end else "leaves a hole behind"
            raise ValueError(f"{short(each.name)} {what} {last}: it begins at byte {each.begin}, and should at {end}")
        end, last = each.end, short(each.name)
    if end != data_bytes:
        less = "it is truncated" if end > data_bytes else "there is more than the header tells of"
        raise ValueError(f"its tensors have {end} bytes, and {data_bytes} lie behind the header: {less}")
    return spans, metadata


def _fields(text: bytes) -> dict[str, Any]:
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
        raise ValueError(f"{short(twin)} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _span(name: str, entry: Any) -> Span:
    shown = short(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} has not just a dtype, a shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    kind = KINDS.get(code) if isinstance(code, str) else None
    if kind is None:
        raise refusal_of_dtype(shown, code)
    if not _are_sizes(shape, _MOST_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the shape {short(shape)} or the data_offsets {short(offsets)} of {shown} are no such")
    in_torch = _in_torch(shown, code, shape)
    nbytes, (begin, end) = math.prod(in_torch) * max(kind.bits // 8, 1), offsets
    if nbytes != end - begin:
        raise ValueError(f"{shown} has {end - begin} bytes, and should have {nbytes}: it is {code} of shape {shape}")
    return Span(name, code, in_torch, begin, end)


def _in_torch(shown: str, code: str, shape: list[int]) -> tuple[int, ...]:
    if code != FOUR_BITS:
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise ValueError(f"{shown} is F4 of shape {shape}, and torch has these by twos")
    return (*shape[:-1], shape[-1] // 2)


def _are_sizes(numbers: Any, most: int) -> bool:
    plain = isinstance(numbers, list) and len(numbers) <= most
    return plain and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def refusal_of_dtype(shown: str, code: object) -> ValueError:
    return ValueError(f"the dtype of {shown} is {short(code)}, which this version of ckpt, or of torch, does not know")


def short(value: object) -> str:
    """What a file says, in a few characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
