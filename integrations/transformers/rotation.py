"""The removal of old checkpoints: the Trainer wants it when it has written one, and it waits until that one is durable."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .transformers_private import ROTATION, find

_waiting: contextvars.ContextVar[list[Rotation] | None] = contextvars.ContextVar("_waiting", default=None)


class Rotation:
    """One call of rotate_checkpoints() of transformers.

    Attributes:
        best: the checkpoint that the Trainer wants to keep beside the newest one, or None.
    """

    def __init__(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(stock).bind(*args, **kwargs)
        given.apply_defaults()
        self._stock, self._given = stock, dict(given.arguments)
        self.best: str | None = self._given["best_model_checkpoint"]

    def run(self, durable: Path, best: str | None) -> None:
        """
        Args:
            durable: the checkpoint that is. Nothing is removed unless it is the newest, by time or by number: that one is
                sure to stay, and what lies there beside it may be half a checkpoint.
            best: what else is to stay.
        """
        from transformers.trainer_utils import sort_checkpoints

        for by_time in {self._given["use_mtime"]: None, False: None}:
            there = sort_checkpoints(self._given["output_dir"], use_mtime=by_time)
            if there and os.path.samefile(there[-1], durable):
                self._stock(**{**self._given, "best_model_checkpoint": best, "use_mtime": by_time})
                return


@contextlib.contextmanager
def collecting() -> Iterator[list[Rotation]]:
    """Meanwhile what this thread wants to remove is noted, and nothing removed."""
    found: list[Rotation] = []
    token = _waiting.set(found)
    try:
        yield found
    finally:
        _waiting.reset(token)


def replace_rotation() -> None:
    """Lets the Trainer's rotation be noted where collecting() says so. Safe to call again."""
    module, name = ROTATION
    stock = find(*ROTATION)
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def rotate(*args: Any, **kwargs: Any) -> None:
        waiting = _waiting.get()
        if waiting is None:
            stock(*args, **kwargs)
        else:
            waiting.append(Rotation(stock, *args, **kwargs))

    setattr(importlib.import_module(module), name, rotate)
