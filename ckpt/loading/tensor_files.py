"""Safetensors files: what their headers say is where, and how the bytes are read.

The format has no checksums. Where a manifest of ours lies beside a file and lists it, as in a bundle, the CRC-32 of the file is
compared as soon as all of it has been read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ckpt import _native
from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.directory import manifest as manifests
from ckpt.errors import CorruptError, StorageError
from ckpt.loading.archive import RecordEntry, Records, reader_threads
from ckpt.safetensors_header import Placed, decode
from ckpt.safetensors_layout import LENGTH_BYTES, length_of
from ckpt.storage import durable

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_LARGEST_INDEX = 100_000_000  # bytes
_NONE: Mapping[str, int] = MappingProxyType({})


def is_tensor_file(path: Path) -> bool:
    """Whether it is a safetensors file, or the index of several: by its name, or because it begins as one.

    What a cache keeps, or the disk of a node, may be called otherwise.
    """
    return path.name.endswith((SUFFIX, INDEX_SUFFIX)) or (os.path.isfile(path) and _begins_as_one(path))


def _begins_as_one(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(LENGTH_BYTES + 1)
            length_of(start[:LENGTH_BYTES], os.fstat(file.fileno()).st_size)
    except (OSError, ValueError):  # whoever reads it says why
        return False
    return start[LENGTH_BYTES:] == b"{"


class TensorFiles(Records):
    """One safetensors file; or those that an index (`*.safetensors.index.json`, of Hugging Face) names, which hold one dict.

    Args:
        timeout_s: longest that one call may read a file, seconds.

    Attributes:
        tensors: by their names, in the order in which they lie there.
        files: those that are read.

    Raises:
        CorruptError: a header or the index is damaged, or does not fit its file; says how.
        StorageError: something cannot be read.
    """

    alignment = 8  # as headers are padded; no dtype of the format asks for more

    def __init__(self, path: Path, timeout_s: float) -> None:
        durable.refuse_irregular(path, "load")
        self.path = path
        if path.name.endswith(INDEX_SUFFIX):
            self.files, self.tensors, numbers = _open_indexed(path, timeout_s)
        else:
            self.files = [_TensorFile(path, timeout_s)]
            self.tensors = self.files[0].tensors
            numbers = dict.fromkeys(self.tensors, 0)
        self.records = {
            name: RecordEntry(numbers[name], self.files[numbers[name]].data_begin + each.begin, each.end - each.begin)
            for name, each in self.tensors.items()
        }

    def storage_names(self) -> list[str]:
        return list(self.tensors)

    def fill(self, destinations: Mapping[str, Any], *, whole: bool = False, devices: Mapping[str, int] = _NONE) -> int | None:
        """See Records. There is no CRC-32 to return."""
        by_file: dict[int, dict[str, Any]] = {}
        for name, place in destinations.items():
            by_file.setdefault(self.records[name].number, {})[name] = place
        for number in sorted(by_file):
            self.files[number].fill(by_file[number], devices)
        return None


class _TensorFile:
    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._manifest = manifests.read_if_any(path.parent)  # before the file, which may be replaced meanwhile
        self._expected = _entry_of(self._manifest, path)
        self._file = _native.RangeFile(os.fsencode(path), True)
        self._check_size()
        if self._file.size < LENGTH_BYTES:
            raise self._corrupt(f"it has {self._file.size} bytes, and a header alone has more")
        try:
            start = self._file.read_bytes(0, LENGTH_BYTES)
            text = self._file.read_bytes(LENGTH_BYTES, length_of(start, self._file.size))
            self.data_begin = LENGTH_BYTES + len(text)
            placed, self.metadata = decode(text, self._file.size - self.data_begin)
        except ValueError as error:
            raise self._corrupt(str(error)) from None
        self.tensors: dict[str, Placed] = {each.name: each for each in placed}
        self._header_crc = _native.crc32(start + text)
        # Of the tensors that have been read, if these are to be compared. Those without bytes need not be.
        self._crcs = {each.name: 0 for each in placed if each.begin == each.end}
        self._compare_if_complete()

    def fill(self, destinations: Mapping[str, Any], devices: Mapping[str, int]) -> None:
        """See Records."""
        places = []
        for name, place in destinations.items():
            each = self.tensors[name]
            offset, nbytes = self.data_begin + each.begin, each.end - each.begin
            places.append((offset, nbytes, place.data_ptr(), devices.get(name, HOST)))
        crcs = self._file.read(
            places,
            threads=reader_threads(),
            timeout_s=self._timeout_s,
            keep=list(destinations.values()),
            driver=torch_devices.in_use.driver,
            streams=torch_devices.streams_of({devices[name] for name in destinations if name in devices}),
        )
        if self._expected is not None:
            self._crcs.update(zip(destinations, crcs, strict=True))
            self._compare_if_complete()

    def _compare_if_complete(self) -> None:
        expected = self._expected
        if expected is None or len(self._crcs) < len(self.tensors):
            return
        crc = self._header_crc
        for name, each in self.tensors.items():
            crc = _native.crc32_combine(crc, self._crcs[name], each.end - each.begin)
        if crc != expected.crc32:
            self._refuse_replaced()
            raise self._corrupt(
                f"its CRC-32 is {crc:08x}, and {expected.crc32:08x} in the {manifests.NAME} beside it: the bytes on disk are "
                f"not those that were written. If another program has written the file since, remove that {manifests.NAME}"
            )

    def _check_size(self) -> None:
        if self._expected is not None and self._file.size != self._expected.bytes:
            self._refuse_replaced()
            raise self._corrupt(
                f"it has {self._file.size} bytes, and {self._expected.bytes} in the {manifests.NAME} beside it: it is "
                f"truncated, or another program has written it since; then remove that {manifests.NAME}"
            )

    def _refuse_replaced(self) -> None:
        if manifests.read_if_any(self.path.parent) != self._manifest:
            raise StorageError(0, f"'{self.path}' was saved again while it was being read: load it again", str(self.path))

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"'{self.path}' is no safetensors file, or damaged: {what}")


def _entry_of(manifest: manifests.Manifest | None, path: Path) -> manifests.FileEntry | None:
    """What the manifest says of the file; None if it has not got its name yet."""
    found = None if manifest is None else next((file for file in manifest.files if file.name == path.name), None)
    if found is None or (found.temporary and (path.parent / found.temporary).exists()):
        return None
    return found


# ---- several files ---------------------------------------------------------------------------------------------------


def _open_indexed(path: Path, timeout_s: float) -> tuple[list[_TensorFile], dict[str, Placed], dict[str, int]]:
    """The files, the tensors, and of each the number of its file."""
    weight_map = _read_index(path)
    names = sorted(set(weight_map.values()))
    files = [_open_part(path, name, timeout_s) for name in names]
    number_of = {name: number for number, name in enumerate(names)}
    tensors, numbers = {}, {}
    for tensor, name in weight_map.items():
        file = files[number_of[name]]
        if tensor not in file.tensors:
            raise CorruptError(f"'{path}' says that {tensor!r} is in '{name}', and it is not: they are of different saves")
        tensors[tensor], numbers[tensor] = file.tensors[tensor], number_of[name]
    return files, tensors, numbers


def _open_part(index: Path, name: str, timeout_s: float) -> _TensorFile:
    if not manifests.is_plain_name(name):
        raise CorruptError(f"'{index}' names a file {name!r}, and may only name such that lie beside it")
    part = index.parent / name
    if not part.exists():
        raise CorruptError(f"'{index}' names '{name}', which is not there: a part of the checkpoint is missing")
    return _TensorFile(part, timeout_s)


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise CorruptError(f"'{path}' is too large for an index")
        content = json.loads(path.read_bytes())
        weight_map = content["weight_map"]
        if not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise ValueError("its weight_map are not texts by texts")
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot load '{path}': {error.strerror}", str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"'{path}' is no index of safetensors files: {type(error).__name__}: {error}") from None
    return dict(weight_map)


def view_as(storage: torch.UntypedStorage, placed: Placed) -> torch.Tensor:
    """The tensor, over memory that holds it."""
    empty = torch.empty(0, dtype=placed.dtype, device=storage.device)
    return empty.set_(storage, 0, placed.shape, _strides_of(placed.shape))


def _strides_of(shape: Iterable[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
