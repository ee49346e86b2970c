"""`.metadata`, by which torch.distributed.checkpoint finds what lies where, from what all ranks have written."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Size

from ckpt import torch_private
from ckpt.errors import CorruptError
from ckpt.sharded.contents import Description, PlacedItem, decode

_FIELDS_BEFORE_2_15 = 5  # of TensorProperties
_AS_PICKLED = "surrogatepass"  # texts that are no UTF-8, as names of files may be


class MetadataWriter:
    """On rank 0. The bytes of the last metadata are kept: when nothing has moved, only the names of the step are exchanged.

    Args:
        compat: "2.14": write it so that torch before 2.15 can read it, too; None: as the running torch does.
    """

    def __init__(self, compat: str | None = None) -> None:
        self._compat = compat
        self._last: tuple[Any, bytes, list[bytes]] | None = None  # of what, its bytes, and the texts of the step in them

    def make(self, description: Description, files: Sequence[str], layouts: Sequence[str], directory: Path) -> bytes:
        """
        Args:
            files, layouts: of each rank: the name of its file, and what it has written to it, see contents.encode().
            directory: of the step.

        Raises:
            CorruptError: together, the ranks have not written each part of each tensor, and each value, once.
        """
        texts = [str(directory).encode(errors=_AS_PICKLED), uuid.uuid4().hex.encode()]
        form = description, tuple(files), tuple(layouts)
        if self._last is not None and self._last[0] == form:
            made = _exchange(self._last[1], self._last[2], texts)
            if made is not None:
                self._last = form, made, texts
                return made
        metadata = _metadata(description, files, [decode(text) for text in layouts])
        from torch.distributed.checkpoint.metadata import StorageMeta

        metadata.storage_meta = StorageMeta(checkpoint_id=texts[0].decode(errors=_AS_PICKLED), save_id=texts[1].decode())
        made = self._pickle(metadata)
        self._last = form, made, texts
        return made

    def _pickle(self, metadata: Any) -> bytes:
        buffer = io.BytesIO()
        (_OlderPickler if self._compat == "2.14" else pickle.Pickler)(buffer, protocol=4).dump(metadata)
        return buffer.getvalue()


class _OlderPickler(pickle.Pickler):
    """Leaves out what newer torch notes of a tensor beside what older torch knows."""

    def reducer_override(self, obj: Any) -> Any:
        from torch.distributed.checkpoint.metadata import TensorProperties

        if type(obj) is not TensorProperties:
            return NotImplemented
        parts: Any = obj.__reduce_ex__(2)
        return *parts[:2], parts[2][:_FIELDS_BEFORE_2_15], *parts[3:]


def _exchange(made: bytes, before: Sequence[bytes], now: Sequence[bytes]) -> bytes | None:
    """None if it takes more than that."""
    for old, new in zip(before, now, strict=True):
        if len(old) != len(new) or made.count(old) != 1:
            return None
        made = made.replace(old, new)
    return made


def _metadata(description: Description, files: Sequence[str], layouts: Sequence[Sequence[PlacedItem]]) -> Any:
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
    )

    names = torch_private.dcp_names()
    state: dict[str, Any] = {
        key.name: BytesStorageMetadata() if key.shape is None else TensorStorageMetadata(key.properties, Size(key.shape), [])
        for key in description.keys
    }
    storage: dict[Any, Any] = {}
    for file, layout in zip(files, layouts, strict=True):
        for item in layout:
            key = description.keys[item.key]
            offsets = None if item.offsets is None else Size(item.offsets)
            if (offsets is None) != (key.shape is None):
                raise CorruptError(f"'{key.name}' is a value on one rank and a tensor on another")
            index = MetadataIndex(key.name, offsets)
            if offsets is not None:
                if index in storage and 0 in item.sizes:
                    continue  # several ranks have nothing of it, and each has said so
                chunks = state[key.name].chunks
                index = MetadataIndex(key.name, offsets, len(chunks))
                chunks.append(ChunkStorageMetadata(offsets, Size(item.sizes)))
            if index in storage:
                raise CorruptError(f"two ranks have written the same part of '{key.name}'")
            storage[index] = names.storage_info(file, item.at, item.length)
    _check(description, state, storage)
    metadata = Metadata(state, planner_data=dict(description.paths), storage_data=storage)
    if any(field.name == "version" for field in dataclasses.fields(Metadata)):
        metadata.version = names.version
    return metadata


def _check(description: Description, state: dict[str, Any], storage: dict[Any, Any]) -> None:
    """No part is missing: that nobody has written two parts in one place is known."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    for key in description.keys:
        if key.shape is None:
            missing = MetadataIndex(key.name) not in storage
        else:
            chunks = state[key.name].chunks
            fits = all(
                offset >= 0 and offset + size <= whole
                for chunk in chunks
                for offset, size, whole in zip(chunk.offsets, chunk.sizes, key.shape, strict=True)
            )
            missing = not chunks or not fits or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(key.shape)
        if missing:
            raise CorruptError(f"the ranks have not written all of '{key.name}', or parts that are not of it")
