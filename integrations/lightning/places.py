"""Where a checkpoint goes by its path or URL, and what becomes of those that are not on a file system of this machine."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Any

from .lightning_private import packages_in_use

logger = logging.getLogger("ckpt")

_said: set[str] = set()


def local_path(path: Any) -> Path | None:
    """Absolute, with no links before the last name; None if it is a URL of somewhere else."""
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if separator:
        if scheme != "file":
            return None
        text = rest
    parent, name = os.path.split(os.path.abspath(os.path.expanduser(text)))
    return Path(os.path.realpath(parent), name)


def stock_io(path: Any) -> Any:
    """What Lightning itself does with it."""
    scheme, separator, _ = os.fspath(path).partition("://")
    if separator and scheme != "file" and scheme not in _said:
        _said.add(scheme)
        logger.warning("Lightning itself saves to '%s', and training waits for it: LazyCheckpointIO saves to local paths", path)
    (package, *_) = packages_in_use()
    return importlib.import_module(f"{package.fabric}.plugins").TorchCheckpointIO()


def is_torch_file(path: Path) -> bool:
    """Whether it is a zip, as torch has written since 1.6."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
