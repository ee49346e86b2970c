"""Uploads of an output directory: what is being put together in it stays out of them.

The Trainer uploads the whole directory but for the checkpoints, in the background, whatever is saved there meanwhile.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .transformers_private import UPLOADS, find

# Directories that have no name yet, and the lock of the job that saves there. Here `*` stands for slashes, too.
HIDDEN = (".lazyckpt-*", ".lock", ".names.lock")


class _Uploading:
    """The client of the hub, whose uploads of directories leave out what is hidden."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def upload_folder(self, *args: Any, ignore_patterns: Any = None, **kwargs: Any) -> Any:
        given = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or ())
        return self._client.upload_folder(*args, ignore_patterns=[*given, *HIDDEN], **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def replace_uploads() -> None:
    """For all Trainers of this process. Safe to call again."""
    module, name = UPLOADS
    stock = find(*UPLOADS)
    if stock is None or hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def uploading(*args: Any, **kwargs: Any) -> Any:
        return _Uploading(stock(*args, **kwargs))

    setattr(importlib.import_module(module), name, uploading)
