"""load(): every byte is read once, straight to where it is to stay, and checked on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ckpt import _native
from ckpt.directory.manifest import FileEntry
from ckpt.errors import CheckpointError, CorruptError, StorageError
from ckpt.loading.archive import TIMEOUT_S, Archive, reader_threads
from ckpt.loading.device_placement import all_on_host
from ckpt.loading.load_tensors import load_tensors
from ckpt.loading.progress import Progress, Told
from ckpt.loading.record_memory import RecordMemory, fill, read_whole
from ckpt.loading.remote_file import as_local
from ckpt.loading.selection import Selection, SharedSelection
from ckpt.loading.skeleton import Skeleton
from ckpt.loading.step_directory import compare, holds_steps, load_directory
from ckpt.loading.tensor_files import is_tensor_file
from ckpt.loading.unpickle import STAY, first_line, has_skeletons, is_pretending, only_weights, raise_explained
from ckpt.storage import durable

logger = logging.getLogger("ckpt")

_OF_DCP = re.compile(r"__\d+(_frozen)?_\d+\.distcp|\.metadata")  # names of torch.distributed.checkpoint
_DCP_LOAD = "load(state, checkpoint_id='{}') of ckpt.integrations.dcp or of torch.distributed.checkpoint"
_OLD_FORMAT = b"\x80\x02" + pickle.encode_long(0x1950A86A20F9469CFC6C).join([b"\x8a\x0a", b"."])  # a pickled magic number


def load(
    path: str | os.PathLike[str],
    map_location: Any = None,
    weights_only: bool = True,
    *,
    keys: str | Sequence[str] | None = None,
    rank: int | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Told | bool | None = None,
) -> Any:
    """Loads a file written by save() or by `torch.save`, verifying the CRC-32 of every record on the way; or a step.

    The result is that of `torch.load`. Several threads read straight into its memory, past the page cache where the file system
    can; memory beside it is some MiB for each thread. What belongs on a CUDA device goes there by way of pinned buffers,
    without a copy of it on the host, unless map_location is a function.

    What is called "*.safetensors", or begins as one, is read as such: a dict of names and tensors, in the order of the file. So
    is what an index names, "*.safetensors.index.json" of Hugging Face, as one dict of all files. The format has no checksums:
    headers and sizes are checked, and, if all of a file is read, its CRC-32 where a manifest.json of this library beside it
    lists the file, as in a bundle. The metadata are not returned: `safetensors.safe_open` gives them.

    Of the directory of a step, as `Checkpointer` and `CheckpointCallback` make it, what the job has saved is returned as one
    dict: the keys of what was replicated, and of the state that a rank had for itself. A directory of such steps stands for the
    newest that is good; which that was is logged. What lies there counts: who wants what is still on nodes, in an object store
    alone, or sharded, calls `Checkpointer.restore`.

    Args:
        path: the file, or a directory as above; or the URL of a file in an object store, as it lies there by way of
            `Tier.remote()`:
            "s3://bucket/run1/step-000000001200/000000000417-8f3a61c2/state.pt". That is fetched to the directory of temporary
            files, and compared with the CRC-32 in the manifest that lies beside it. Credentials come from the environment.
        map_location: as in `torch.load`.
        weights_only: as in `torch.load`. False unpickles arbitrary objects, which can run any code: only for files you trust.
        keys: a pattern, or several, over dotted paths, as in "model.layers.0.*" ("*" matches dots too): only what matches one,
            with what is below it, is read and returned, in containers without the rest; in lists and tuples None stands for
            what is left out. Default: all.
        rank: of a step that several ranks have saved: whose own state is wanted beside what was replicated. Default: none of
            them, which a warning says; if the job had one rank, or one alone had a state of its own, that one.
        timeout_s: longest that reading may take, seconds.
        progress: called every 0.1 s, by another thread, with the bytes that have been read and those of the file, or of a
            step, and at the end; True: a bar of tqdm on standard error. Of what is no torch file only the end is told.

    Raises:
        CorruptError: the file is truncated, or a checksum is wrong; names the record. Of a directory of steps: none is good.
        StorageError: it cannot be read, or is a directory that holds no checkpoint of this kind.
        DeadlineError: reading took longer than timeout_s.
        DeviceError: some of it goes to a CUDA device whose current stream is being captured into a graph.
        CheckpointError: it holds objects that weights_only refuses, or nothing that a pattern of keys matches; or it is a part
            of a sharded checkpoint. Of a step: it has no state of `rank`, or only states of several ranks and rank is None; or
            its parts have a key in common.
        NotACheckpointError: of a URL: there is no manifest beside it, or that does not name it. Of a directory of steps: none
            of them is a checkpoint.
        TypeError, ValueError: keys are no patterns, rank is no count or the path that of a file, or the URL is none of a file.
        ImportError: progress is True, and there is no tqdm.
    """
    selection = None if keys is None else Selection(keys)
    with Progress(progress) as watch, as_local(path) as target:
        if holds_steps(target):
            shared = None if keys is None else SharedSelection(keys)

            def load_file(file: Path, entry: FileEntry) -> Any:
                return _load_watched(watch, file, map_location, weights_only, shared, timeout_s, entry)

            return load_directory(target, rank, load_file, shared, watch.begin)
        if rank is not None:
            raise ValueError(f"rank= is for the directory of a step, and '{path}' is none")
        watch.begin(_size_of(target))
        return _load_watched(watch, target, map_location, weights_only, selection, timeout_s)


def _size_of(path: Path) -> int:
    """0 if it cannot be told: who reads it will say why."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _load_watched(
    watch: Progress,
    target: Path,
    map_location: Any,
    weights_only: bool,
    selection: Selection | None,
    timeout_s: float,
    expected: FileEntry | None = None,
) -> Any:
    """
    Args:
        expected: what a manifest says of it.
    """
    archive = _archive_in(target, timeout_s)
    with watch.reading(*((_size_of(target), None) if archive is None else (archive.all_bytes, archive.counter()))):
        return _load(target, archive, map_location, weights_only, selection, timeout_s, expected)


def _archive_in(target: Path, timeout_s: float) -> Archive | None:
    """None: it is none that is read record by record."""
    if is_tensor_file(target) or not is_zip(target) or is_pretending():
        return None
    return open_archive(target, timeout_s)


def _load(
    target: Path,
    archive: Archive | None,
    map_location: Any,
    weights_only: bool,
    selection: Selection | None,
    timeout_s: float,
    expected: FileEntry | None,
) -> Any:
    if is_tensor_file(target):
        return load_tensors(target, map_location, selection, timeout_s)
    if archive is None:
        load_it = _load_pretended if is_zip(target) else _load_old_format
        loaded = load_it(target, map_location, weights_only)
        return selection.prune(loaded, target) if selection else loaded
    if expected is not None:
        compare(target, expected, archive.size, None)
    if not archive.checksummed:
        logger.info("'%s' was written without checksums: nothing could be verified", target)
    if selection and has_skeletons():
        if expected is not None:
            compare(target, expected, archive.size, archive.claimed_crc32())
        return _load_part(archive, selection, map_location, weights_only)
    contents, crc = read_whole(archive, map_location)
    if expected is not None:
        compare(target, expected, archive.size, crc)
    loaded = contents.unpickle(map_location, weights_only)
    return selection.prune(loaded, target) if selection else loaded


def open_archive(path: Path, timeout_s: float) -> Archive:
    """
    Raises:
        CheckpointError: it is not for unpickling.
    """
    archive = Archive(path, timeout_s)
    if "constants.pkl" in archive.records:
        raise CheckpointError(f"'{path}' is a TorchScript archive, which is a program: torch.jit.load reads it")
    return archive


def _load_pretended(path: Path, map_location: Any, weights_only: bool) -> Any:
    """What torch itself makes of the file, once it has been verified: there is no memory to read to."""
    _native.verify_torch_file(os.fsencode(path), reader_threads())
    return torch.load(path, map_location=map_location, weights_only=weights_only)


def _load_part(archive: Archive, selection: Selection, map_location: Any, weights_only: bool) -> Any:
    """Unpickles twice: first to see what is wanted, then over the bytes of that."""
    skeleton = Skeleton(archive, weights_only)
    needed = skeleton.records_of(selection.prune(skeleton.value, archive.path))
    memory = RecordMemory.where_loaded(archive, needed, map_location, skeleton.small)
    fill(archive, memory)
    absent = {name: storage for name, storage in skeleton.storages.items() if name not in needed}
    skeleton.value = None
    contents = memory.contents(skeleton.small, absent)
    location = STAY if str(map_location) in ("None", "cpu") and all_on_host(skeleton.small) else map_location
    return selection.prune(contents.unpickle(location, weights_only, is_filled=not absent), archive.path)


def _load_old_format(path: Path, map_location: Any, weights_only: bool) -> Any:
    """Nothing tells damage in such a file from anything else that may go wrong."""
    try:
        return torch.load(path, map_location=map_location, weights_only=weights_only)
    except Exception as error:
        if isinstance(error, (pickle.UnpicklingError, EOFError)):
            raise_explained(error, path, only_weights(weights_only))
        raise CheckpointError(
            f"'{path}' cannot be loaded; it is in torch's format of before 1.6, which has no checksums, and may be damaged: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def is_zip(path: Path) -> bool:
    """True for a zip, False for torch's format of before 1.6, which has no checksums.

    Raises:
        StorageError: the file cannot be read, or is a directory.
        CorruptError: it is neither.
        CheckpointError: it is a part of a sharded checkpoint.
    """
    durable.refuse_irregular(path, "load")
    if _OF_DCP.fullmatch(path.name):
        raise CheckpointError(
            f"'{path}' is a part of a sharded checkpoint, which is read as a whole: "
            f"Checkpointer(...).restore(sharded_into=state), or {_DCP_LOAD.format(path.parent)}"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(len(_OLD_FORMAT))
            with contextlib.suppress(zipfile.BadZipFile):
                if start.startswith(b"PK\x03\x04") or zipfile.is_zipfile(file):
                    return True
    except IsADirectoryError as error:
        text = (
            f"cannot load '{path}': it is a directory, and this reads one file. The newest checkpoint of a job is what "
            f"Checkpointer(...).restore() gives; a sharded one reads {_DCP_LOAD.format(path)}"
        )
        raise StorageError(error.errno or 0, text, str(path)) from error
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot load '{path}': {error.strerror}", str(path)) from error
    if start == _OLD_FORMAT:
        return False
    raise CorruptError(f"'{path}' is not a torch file: it begins like neither of torch's formats")
