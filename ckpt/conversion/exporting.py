"""Writes a checkpoint anew, as safetensors files or as one torch file: tensor by tensor, and no more than one in memory."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from ckpt.conversion.sources import Entry, Path_, Piece, Position, Source, TuplePosition, dotted, view_bytes
from ckpt.errors import CheckpointError, UnsupportedError
from ckpt.plan.pickler import pickle_object
from ckpt.safetensors_header import CODES, encode, in_file_order
from ckpt.safetensors_header import Entry as HeaderEntry
from ckpt.storage import durable
from ckpt.storage.streamed_file import StreamedFile, Within, begin_entry
from ckpt.torch_private import key_of

Told = Callable[[int], object]  # called with the bytes of each tensor, once it is written

_STEM = "model"


@dataclasses.dataclass(frozen=True)
class Exported:
    """
    Attributes:
        files: that were written.
        tensors, bytes: how many, and of what size.
        left_out: names of values that the format cannot hold.
    """

    files: list[Path]
    tensors: int
    bytes: int
    left_out: list[str]


class Chosen:
    """What of a source is to be written, and how.

    Args:
        keys: patterns over dotted names; empty: all.
        dtype: of tensors of real floating point numbers; None: as they are.
        strip: what names are to begin with no more, as in "model.".

    Attributes:
        entries, tensors: all that is chosen, and what of it are tensors, by the names that they get.
        names: of all that is chosen, as the checkpoint has them.

    Raises:
        CheckpointError: nothing matches one of the patterns, or two get the same name, or one gets none, or a dot at its begin.
    """

    def __init__(self, source: Source, keys: Sequence[str] = (), dtype: torch.dtype | None = None, strip: str = "") -> None:
        self._source, self._dtype = source, dtype
        patterns = {key: re.compile(fnmatch.translate(key)).match for key in keys}
        for key, match in patterns.items():
            if not any(map(match, source.entries)):
                raise CheckpointError(
                    f"nothing in the checkpoint matches '{key}'; its first names are {list(source.entries)[:8]}"
                )
        self.names = [name for name in source.entries if not patterns or any(match(name) for match in patterns.values())]
        self._names = {name.removeprefix(strip): name for name in self.names}
        if len(self._names) < len(self.names):
            raise CheckpointError(f"without '{strip}' two names are the same: choose some by --keys")
        self.entries: dict[str, Entry] = {}
        for written, name in self._names.items():
            entry = self._as_written(source.entries[name])
            self.entries[written] = entry if written == name else entry._replace(path=_shortened(entry.path, name, strip))
        self.tensors = {name: entry for name, entry in self.entries.items() if entry.shape is not None}

    def _as_written(self, entry: Entry) -> Entry:
        if self._dtype is None or entry.dtype is None or not entry.dtype.is_floating_point:
            return entry
        return entry._replace(dtype=self._dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """Contiguous, in the dtype that was asked for.

        Raises:
            CheckpointError: it is another one than the checkpoint says, or cannot be read.
        """
        return self._made(name, self._source.tensor(self._names[name]), self.entries[name].shape)

    def pieces(self, name: str) -> list[Piece]:
        """The same, as it lies there."""

        def read(piece: Piece) -> torch.Tensor:
            return self._made(name, piece.read(), piece.sizes)

        return [piece._replace(read=functools.partial(read, piece)) for piece in self._source.pieces(self._names[name])]

    def _made(self, name: str, found: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
        before = self._source.entries[self._names[name]].dtype
        if (tuple(found.shape), found.dtype) != (shape, before):
            raise CheckpointError(f"'{name}' is {found.dtype} {list(found.shape)} and not {before} {list(shape or ())}")
        return found.detach().to(self.entries[name].dtype).contiguous()

    def value(self, name: str) -> Any:
        return self._source.value(self._names[name])


def _shortened(path: Path_, name: str, prefix: str) -> Path_:
    """The path of what is called `name` without that prefix: keys may have dots themselves, and it may end within one."""
    written = name.removeprefix(prefix)
    if not written or written.startswith("."):
        raise CheckpointError(
            f"without '{prefix}' the name '{name}' would be '{written}': strip '{prefix}.', or choose others by --keys"
        )
    if dotted(path) != name:
        return (written,)
    left = prefix
    for number, key in enumerate(path):
        if not left:
            return path[number:]
        text = f"{key}."
        if not left.startswith(text):
            return (str(key).removeprefix(left), *path[number + 1 :])
        left = left.removeprefix(text)
    raise AssertionError(f"'{prefix}' is longer than '{name}'")


# ---- safetensors -----------------------------------------------------------------------------------------------------


def write_safetensors(chosen: Chosen, output: Path, shard_bytes: int | None = None, told: Told = lambda _: None) -> Exported:
    """One file; or, in a directory, several and an index, each of at most so many bytes of tensors, if one tensor allows that.

    Args:
        output: the file; with shard_bytes the directory.

    Raises:
        UnsupportedError: the format has no name for a dtype.
        CheckpointError, StorageError: it cannot be read, or not be written.
    """
    for name, entry in chosen.tensors.items():
        if entry.dtype not in CODES:
            raise UnsupportedError(f"'{name}' is of {entry.dtype}, for which safetensors has no name: convert it by --dtype")
    left_out = [name for name in chosen.entries if name not in chosen.tensors]
    total = sum(entry.nbytes for entry in chosen.tensors.values())
    if shard_bytes is None:
        _write_one(chosen, list(chosen.tensors), output, told)
        return Exported([output], len(chosen.tensors), total, left_out)
    durable.make_directory(output, durable=True)
    shards = _cut(chosen.tensors, shard_bytes)
    files = [output / f"{_STEM}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_one(chosen, names, file, told)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
    }
    files.append(output / f"{_STEM}.safetensors.index.json")
    durable.replace_durably(files[-1], json.dumps(index, indent=2).encode() + b"\n", "stored")
    return Exported(files, len(chosen.tensors), total, left_out)


def _cut(tensors: dict[str, Entry], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in tensors.items():
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.nbytes
    return shards


def _write_one(chosen: Chosen, names: Sequence[str], path: Path, told: Told) -> None:
    """As `save_file` of safetensors writes these tensors, to the byte."""
    entries = [HeaderEntry(name, *_form(chosen.tensors[name])) for name in names]
    by_name = {each.name: each for each in entries}
    order = in_file_order(by_name, {name: each.dtype for name, each in by_name.items()})
    try:
        header = encode([by_name[name] for name in order], [chosen.tensors[name].nbytes for name in order], {"format": "pt"})
    except ValueError as error:
        raise UnsupportedError(f"'{path}' cannot be a safetensors file: {error}") from None
    with StreamedFile(path) as file:
        file.write(header)
        for name in order:
            _write_tensor(file, chosen=chosen, name=name, told=told)


def _form(entry: Entry) -> tuple[torch.dtype, tuple[int, ...]]:
    assert entry.dtype is not None and entry.shape is not None
    return entry.dtype, entry.shape


def _write_tensor(file: Any, *, chosen: Chosen, name: str, told: Told) -> None:
    write_elements(file, chosen.tensor(name), told)


def write_elements(file: Any, tensor: torch.Tensor, told: Told) -> None:
    file.write(view_bytes(tensor))
    told(tensor.nbytes)


# ---- torch -----------------------------------------------------------------------------------------------------------


def write_torch(chosen: Chosen, output: Path, told: Told = lambda _: None) -> Exported:
    """One file, as torch.save writes it. Tensors that shared memory do so no more.

    Raises:
        CheckpointError, StorageError: it cannot be read, or not be written.
    """
    hollow = {
        name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in chosen.tensors.items() if entry.shape is not None
    }
    parts = {name: hollow[name] if name in hollow else chosen.value(name) for name in chosen.entries}
    value = nested((chosen.entries[name].path, part) for name, part in parts.items())
    writers = [
        (tensor, functools.partial(_write_tensor, chosen=chosen, name=name, told=told)) for name, tensor in hollow.items()
    ]
    with StreamedFile(output) as file:
        write_archive(file, value, writers)
    total = sum(entry.nbytes for entry in chosen.tensors.values())
    return Exported([output], len(chosen.tensors), total, [])


def write_archive(file: BinaryIO | Within, value: Any, writers: Iterable[tuple[torch.Tensor, Callable[[Any], object]]]) -> None:
    """An archive as torch.save makes it.

    Args:
        value: what it holds.
        writers: of each tensor in that: what writes its elements to the file that it is called with. The memory of these
            tensors is not looked at.
    """
    content, records = pickle_object(value)
    found = {key_of(tensor.untyped_storage()): (tensor.nbytes, write) for tensor, write in writers if tensor.numel()}
    with zipfile.ZipFile(cast(IO[bytes], file), "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, file, "data.pkl", content)
        _add(archive, file, "byteorder", sys.byteorder.encode())
        for record in records:
            nbytes, write = found.get(key_of(record.storage), (0, None))
            with begin_entry(archive, file, f"data/{record.key}", nbytes) as entry:
                if write is not None:
                    write(entry)
        _add(archive, file, "version", b"3\n")


def _add(archive: zipfile.ZipFile, file: BinaryIO | Within, name: str, content: bytes) -> None:
    with begin_entry(archive, file, name, len(content)) as entry:
        entry.write(content)


class _Level(dict[Any, Any]):
    """Of containers, while they are built."""


def nested(parts: Iterable[tuple[Path_, Any]]) -> Any:
    """What lies at these paths. In lists and tuples None stands for what was left out.

    Raises:
        CheckpointError: two lie at the same path, or one within another that is no empty dict.
    """
    found = list(parts)
    if len(found) == 1 and found[0][0] == ():
        return found[0][1]
    root = _Level()
    for path, value in found:
        node = root
        for key in path[:-1]:
            if key not in node or _is_empty(node[key]):
                node[key] = _Level()
            node = node[key]
            if not isinstance(node, _Level):
                raise _in_the_way(path)
        if not path:
            raise _in_the_way(path)
        there = node.get(path[-1])
        if path[-1] in node and not (isinstance(there, _Level) and _is_empty(value)):
            raise _in_the_way(path)
        node.setdefault(path[-1], value)
    return _closed(root)


def _is_empty(value: Any) -> bool:
    """Of several files of a checkpoint, one may have an empty dict where another has something in it."""
    return type(value) is dict and not value


def _in_the_way(path: Path_) -> CheckpointError:
    return CheckpointError(
        f"'{dotted(path)}' cannot be written: something else is to lie at that place, or within it, or it within that; choose "
        "some by --keys, or strip another prefix"
    )


def _closed(node: Any) -> Any:
    if not isinstance(node, _Level):
        return node
    made = {key: _closed(part) for key, part in node.items()}
    if not all(isinstance(key, Position) for key in made):
        return {int(key) if isinstance(key, Position) else key: part for key, part in made.items()}
    items = [made.get(number) for number in range(max(made) + 1)]
    return tuple(items) if all(isinstance(key, TuplePosition) for key in made) else items
