"""load_into(): the bytes of a file straight into tensors that are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.errors import CheckpointError
from ckpt.fence import fence
from ckpt.loading.archive import TIMEOUT_S, Archive
from ckpt.loading.in_place import InPlaceRead
from ckpt.loading.load import is_zip, open_archive
from ckpt.loading.load_tensors import TensorSkeleton
from ckpt.loading.record_memory import fill
from ckpt.loading.remote_file import as_local
from ckpt.loading.skeleton import Skeleton
from ckpt.loading.target_match import TargetMatch
from ckpt.loading.tensor_files import TensorFiles, is_tensor_file


class Loaded(NamedTuple):
    """What load_into() has done, by paths such as "model.layers.0.weight".

    Attributes:
        loaded: what both sides have. Of an optimizer only its own path.
        missing: what only the target has, and keeps.
        unexpected: what only the file has.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


def load_into(
    path: str | os.PathLike[str],
    target: Any,
    strict: bool = True,
    *,
    weights_only: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> Loaded:
    """Loads a file, as load() takes it, into tensors that exist: no second copy of the state is made.

    Everything is compared before a byte is written, but for modules that load in a way of their own. Then records are read
    straight into the memory of tensors on the CPU or a CUDA device that are laid out as in the file; for each other tensor
    (strided otherwise, a part of a record) through a temporary of its size. Saves in flight are fenced first. Version counters
    move, as for any change in place.

    Args:
        path: the file, or its URL in an object store, as for load(). A safetensors file is for a module or a flat dict of
            tensors. A name that it lacks is no difference if its tensor shares memory with one that it has: tied weights.
        target: what load() would return, with memory already: nested dicts, lists and tuples of tensors, modules and
            optimizers. A module stands for its state_dict(), an optimizer for its own; an optimizer that has not stepped yet
            takes the state from the file. Its groups and state follow the file, as with its load_state_dict(), in the dtypes of
            the file. Numbers, texts and other plain values are replaced where their container allows it. A module with hooks or
            methods of its own for its state is given a copy of what the file holds, by its load_state_dict(), when all has been
            read. Where several tensors of the target share memory, the last of them stays.
        strict: keys that only one side has are an error; False passes over them, and returns them.
        weights_only: as in `torch.load`.
        timeout_s: longest that reading may take, seconds.

    Returns:
        paths of what was loaded, of what the file lacks, and of what the target lacks.

    Raises:
        MismatchError: the two do not fit; lists all keys, dtypes and shapes that differ. Also with strict=False if they have no
            key in common. Nothing has been written, unless it is a module that refuses in its load_state_dict(), which the
            message says.
        CorruptError, StorageError, NotACheckpointError, DeadlineError: as from load(). If that is found while reading, the
            target holds parts of the file: load another one into it.
        DeviceError: the current stream of a CUDA device is being captured into a graph. Nothing has been written.
        CheckpointError: the file holds objects that weights_only refuses, or is in torch's format of before 1.6.
    """
    with as_local(path) as there:
        return _load_into(there, target, strict, weights_only, timeout_s)


def _load_into(path: Path, target: Any, strict: bool, weights_only: bool, timeout_s: float) -> Loaded:
    skeleton = _skeleton_of(path, target, weights_only, timeout_s)
    archive = skeleton.archive
    match = TargetMatch(skeleton, strict)
    match.compare(skeleton.value, target)
    match.expect_something()
    if match.problems:
        raise match.mismatch()
    fence()
    in_place = InPlaceRead(archive, match.pairs, match.memory())
    in_place.begin()
    fill(archive, in_place)
    in_place.finish()
    match.put_rest()
    return Loaded(match.loaded, match.missing, match.unexpected)


def _skeleton_of(path: Path, target: Any, weights_only: bool, timeout_s: float) -> Skeleton:
    if not is_tensor_file(path):
        return Skeleton(_open(path, timeout_s), weights_only)
    skeleton = TensorSkeleton(TensorFiles(path, timeout_s))
    skeleton.add_tied(target)
    return skeleton


def _open(path: Path, timeout_s: float) -> Archive:
    """For what goes by records.

    Raises:
        CheckpointError: this file has none.
    """
    if not is_zip(path):
        raise CheckpointError(f"'{path}' is in torch's format of before 1.6: use load()")
    archive = open_archive(path, timeout_s)
    if archive.byte_order() not in (None, "little"):
        raise CheckpointError(f"'{path}' is from a machine of another byte order: use load()")
    return archive
