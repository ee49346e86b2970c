"""torch.distributed.checkpoint, as frameworks call it with a FileSystemWriter or FileSystemReader of their own.

They import it inside the function that calls it. So its own save() and load() are replaced, and are the stock ones unless the
thread that calls puts a bundle together, or reads one, see open_bundle.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .open_bundle import OpenBundle, bundle_of

_verifying: contextvars.ContextVar[bool] = contextvars.ContextVar("_verifying", default=False)
_TO_BUNDLES = "saves_to_bundles"  # marks functions of ours


def replace_sharded_writes() -> None:
    """Safe to call again."""
    import torch.distributed.checkpoint as stock

    dcp: Any = stock
    if not hasattr(dcp.save, _TO_BUNDLES):
        dcp.save = _saving(dcp.save, dcp.FileSystemWriter)
        dcp.load = _loading(dcp.load, dcp.FileSystemReader)


@contextlib.contextmanager
def verifying() -> Iterator[None]:
    """Meanwhile what this thread loads is verified, byte by byte."""
    token = _verifying.set(True)
    try:
        yield
    finally:
        _verifying.reset(token)


def _saving(stock: Any, plain: Any) -> Any:
    @functools.wraps(stock)
    def save(*args: Any, **kwargs: Any) -> Any:
        writer = kwargs.get("storage_writer")
        path = getattr(writer, "path", None) if type(writer) is plain else None
        bundle = bundle_of(path)
        if bundle is None or not _save_there(bundle, path, *args, **kwargs):
            return stock(*args, **kwargs)
        return None

    setattr(save, _TO_BUNDLES, True)
    return save


def _save_there(bundle: OpenBundle, path: Any, *args: Any, **kwargs: Any) -> bool:
    """False: the state, or what is to be done with it, is left to torch."""
    state = args[0] if args else kwargs.get("state_dict")
    plain = {"state_dict", "storage_writer", "planner"}  # the planner that frameworks give is the default
    return len(args) <= 1 and kwargs.keys() <= plain and bundle.save_sharded(state, Path(path))


def _loading(stock: Any, plain: Any) -> Any:
    @functools.wraps(stock)
    def load(*args: Any, **kwargs: Any) -> Any:
        reader: Any = kwargs.get("storage_reader")
        if _verifying.get() and type(reader) is plain:
            from ..dcp import VerifyingStorageReader

            kwargs["storage_reader"] = VerifyingStorageReader(reader.path)
        return stock(*args, **kwargs)

    return load
