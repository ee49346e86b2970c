"""load(): check every byte, then let torch read the file."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ckpt import _native
from ckpt.errors import CheckpointError, CorruptError, StorageError

logger = logging.getLogger("ckpt")

_OLD_FORMAT = b"\x80\x02" + pickle.encode_long(0x1950A86A20F9469CFC6C).join([b"\x8a\x0a", b"."])  # a pickled magic number


def checksum_threads() -> int:
    return min(4, os.cpu_count() or 1)


def load(path: str | os.PathLike[str], map_location: Any = None, weights_only: bool = True) -> Any:
    """Loads a file written by save() or by `torch.save`, after verifying the CRC-32 of every record.

    Args:
        path: the file.
        map_location: as in `torch.load`.
        weights_only: as in `torch.load`. False unpickles arbitrary objects, which can run any code: only for files you trust.

    Raises:
        CorruptError: the file is truncated, or a checksum is wrong; names the record.
        StorageError: it cannot be read.
        CheckpointError: it holds objects that weights_only refuses.
    """
    target = Path(os.fspath(path))
    if not _is_zip(target):
        return _load_old_format(target, map_location, weights_only)
    if not _native.verify_torch_file(os.fsencode(target), checksum_threads()):
        logger.info("'%s' was written without checksums: nothing could be verified", target)
    return torch_load(target, map_location, weights_only)


def torch_load(path: Path, map_location: Any, weights_only: bool) -> Any:
    """torch.load with errors that say what to do. For bytes that have been verified."""
    try:
        return torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if weights_only and "weights_only" in str(error).lower():
            raise CheckpointError(
                f"'{path}' holds objects that weights_only loading refuses ({_first_line(error)}); if you trust the file, pass "
                "weights_only=False, which can run any code in it"
            ) from error
        raise CorruptError(f"'{path}' is not a torch file, or damaged: {_first_line(error)}") from error
    except EOFError as error:
        raise CorruptError(f"'{path}' is not a torch file, or cut off") from error


def _load_old_format(path: Path, map_location: Any, weights_only: bool) -> Any:
    """Nothing tells damage in such a file from anything else that may go wrong."""
    try:
        return torch_load(path, map_location, weights_only)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"'{path}' cannot be loaded; it is in torch's format of before 1.6, which has no checksums, and may be damaged: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _is_zip(path: Path) -> bool:
    """True for a zip, False for torch's format of before 1.6, which has no checksums.

    Raises:
        StorageError: the file cannot be read.
        CorruptError: it is neither.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_OLD_FORMAT))
            if start.startswith(b"PK\x03\x04") or zipfile.is_zipfile(file):
                return True
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot load '{path}': {error.strerror}", str(path)) from error
    if start == _OLD_FORMAT:
        return False
    raise CorruptError(f"'{path}' is not a torch file: it begins like neither of torch's formats")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
