"""Writes a checkpoint anew, as a directory of torch.distributed.checkpoint: what was sharded stays so, one part is in memory.

The files come first and `.metadata` last, in a directory that gets its name once all of it is durable.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ckpt.conversion.exporting import Chosen, Exported, Told, nested, write_archive, write_elements
from ckpt.directory.sharded_files import METADATA
from ckpt.errors import CheckpointError, UnsupportedError
from ckpt.sharded.chunks import Box
from ckpt.sharded.contents import Description, Item, Key, encode
from ckpt.sharded.metadata import MetadataWriter
from ckpt.storage import durable
from ckpt.storage.streamed_file import StreamedFile, Within
from ckpt.storage.temporary_names import temporary_path
from ckpt.torch_private import flatten_state_dict


class _Part(NamedTuple):
    """One archive of a file. `nbytes`: of a tensor's elements; `box`: None: it is a value."""

    key: int
    nbytes: int
    box: Box | None
    read: Callable[[], Any]


class _Value(NamedTuple):
    """Stands for a value, which is read when it is written."""

    name: str


def write_dcp(chosen: Chosen, output: Path, shard_bytes: int | None = None, told: Told = lambda _: None) -> Exported:
    """
    Args:
        output: the directory; if it is there it is empty.
        shard_bytes: how many bytes of tensors are in one file, if one part allows that; None: all are in one.

    Raises:
        UnsupportedError: the checkpoint is no dict.
        CheckpointError, StorageError: it cannot be read, or not be written.
    """
    description, parts = _lay_out(chosen)
    files = _cut(parts, shard_bytes)
    names = [f"__0_{number}.distcp" for number in range(len(files))]
    with _aside(output) as directory:
        layouts = [_write_file(directory / name, each, told) for name, each in zip(names, files, strict=True)]
        content = MetadataWriter().make(description, names, layouts, output)
        durable.write_small_file(directory / METADATA, content)
        durable.sync_directory(directory)
    total = sum(entry.nbytes for entry in chosen.tensors.values())
    return Exported([output / name for name in (*names, METADATA)], len(chosen.tensors), total, [])


def _lay_out(chosen: Chosen) -> tuple[Description, list[_Part]]:
    """By the keys that torch gives what lies in nested dicts and lists."""
    hollow = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in chosen.tensors.items()
        if entry.shape is not None
    }
    names = {id(tensor): name for name, tensor in hollow.items()}
    state = nested((entry.path, hollow.get(name, _Value(name))) for name, entry in chosen.entries.items())
    if not isinstance(state, dict):
        raise UnsupportedError("torch.distributed.checkpoint takes a dict, and what was chosen is none: export it as pt")
    flat, paths = flatten_state_dict(state)
    keys, parts = [], []
    for number, (key, part) in enumerate(flat.items()):
        if (name := names.get(id(part))) is None:
            keys.append(Key(key, None, None))
            parts.append(_Part(number, 0, None, lambda part=part: _filled(part, chosen, names)))  # type: ignore[misc]
            continue
        keys.append(Key(key, tuple(part.shape), _properties(part)))
        for piece in chosen.pieces(name):
            box = Box(piece.offsets, piece.sizes, (0,) * len(piece.sizes))
            nbytes = torch.Size(piece.sizes).numel() * part.itemsize
            parts.append(_Part(number, nbytes, box, piece.read))
    return Description(keys, paths), parts


def _properties(hollow: torch.Tensor) -> Any:
    from torch.distributed.checkpoint.metadata import TensorProperties

    return TensorProperties.create_from_tensor(hollow)


def _filled(part: Any, chosen: Chosen, names: dict[int, str]) -> Any:
    """What torch saves as one value, also if it holds tensors, as a tuple of them."""
    if isinstance(part, _Value):
        return chosen.value(part.name)
    if id(part) in names:
        return chosen.tensor(names[id(part)])
    if isinstance(part, dict):
        return {key: _filled(each, chosen, names) for key, each in part.items()}
    return type(part)(_filled(each, chosen, names) for each in part) if type(part) in (list, tuple) else part


def _cut(parts: Sequence[_Part], most: int | None) -> list[list[_Part]]:
    files: list[list[_Part]] = [[]]
    size = 0
    for part in parts:
        if most is not None and files[-1] and size + part.nbytes > most:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.nbytes
    return files


def _write_file(path: Path, parts: Sequence[_Part], told: Told) -> str:
    """What is where in it: see contents.encode()."""
    places = []
    with StreamedFile(path) as file:
        for part in parts:
            at = file.tell()
            if part.box is None:
                buffer = io.BytesIO()
                torch.save(part.read(), buffer)
                file.write(buffer.getbuffer())
            else:
                tensor = part.read()
                hollow = torch.empty(tensor.shape, dtype=tensor.dtype)
                write = functools.partial(write_elements, tensor=tensor, told=told)
                write_archive(Within(file), hollow, [(hollow, write)])
                del tensor, write  # before the next one is read
            places.append((at, file.tell() - at))
    return encode([Item(part.key, part.box) for part in parts], places)


@contextlib.contextmanager
def _aside(output: Path) -> Iterator[Path]:
    durable.directory_of_target(output)
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"'{output}' is there, and is no empty directory: remove it, or choose another one")
    aside = temporary_path(output)
    durable.make_directory(aside, durable=False)
    try:
        yield aside
        durable.rename_durably(aside, output)
    except BaseException:
        if aside.exists():
            durable.remove_tree(aside)
        raise
