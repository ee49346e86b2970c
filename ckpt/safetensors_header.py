"""The header of a safetensors file, as torch has what it says: safetensors_layout.py describes and reads its text.

The library `safetensors` writes tensors by descending rank of their dtype, then by name, and refuses what has gaps. So do we.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ckpt import safetensors_layout as layout
from ckpt.safetensors_layout import FOUR_BITS, KINDS, LENGTH_BYTES, LONGEST, METADATA

_ALIGNMENT = 8

_KNOWN = [(getattr(torch, kind.name), code) for code, kind in KINDS.items() if hasattr(torch, kind.name)]  # or torch is older
RANKS: Mapping[torch.dtype, int] = {dtype: rank for rank, (dtype, _) in enumerate(_KNOWN)}  # the lowest comes first
CODES: Mapping[torch.dtype, str] = dict(_KNOWN)
DTYPES: Mapping[str, torch.dtype] = {code: dtype for dtype, code in _KNOWN}
PAIRS = DTYPES.get(FOUR_BITS)  # two values are one element here, and two in the file

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


def decode(text: bytes, data_bytes: int) -> tuple[list[Placed], dict[str, str]]:
    """The tensors, in the order in which they lie in the file, and the metadata.

    Args:
        data_bytes: that lie behind the header.

    Raises:
        ValueError: it is no header, or one of another file; says what is wrong.
    """
    spans, metadata = layout.parse(text, data_bytes)
    for each in spans:
        if each.code not in DTYPES:
            raise layout.refusal_of_dtype(layout.short(each.name), each.code)
    return [Placed(each.name, DTYPES[each.code], each.shape, each.begin, each.end) for each in spans], metadata
