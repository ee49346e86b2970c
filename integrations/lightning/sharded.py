"""Checkpoints of strategies whose ranks each hold a part: a directory of torch.distributed.checkpoint, and `meta.pt` beside it.

It is put together under a hidden name, and gets its own when all of it is durable on all ranks:

    1. each rank writes its part, rank 0 `meta.pt` too                all under the hidden name
    2. `.metadata` is published there, once all ranks are durable     by DcpCheckpointer
    3. rank 0 gives the directory its name, when 2 and `meta.pt` are done

So what has the name is whole, and what had it before is until then.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ckpt
from ckpt import names
from ckpt.dcp import DcpCheckpointer
from ckpt.errors import UnsupportedError

from .. import dcp
from .lightning_private import META_FILE

logger = logging.getLogger("ckpt")


class ShardedSaves:
    """Of one process. All ranks make the same calls in the same order."""

    def __init__(self, options: ckpt.Options) -> None:
        self._options = options
        self._saves: DcpCheckpointer | None = None

    def save(
        self, state: dict[str, Any], rest: dict[str, Any], hidden: Path, path: Path, rank: int, lazy: bool | None
    ) -> NamedLater:
        """Begins it.

        Raises:
            CheckpointError: it could not be begun, here or on another rank.
        """
        parts: list[Any] = []
        try:
            parts.append(self._save_state(state, hidden, lazy))
            if rank == 0:
                names.make_directory(hidden)
                parts.append(ckpt.save(rest, hidden / META_FILE, lazy=False, options=self._options))
        except BaseException:
            if rank == 0:
                _discard_behind(parts, hidden)
            raise
        return NamedLater(parts, hidden, path, gives_name=rank == 0)

    def _save_state(self, state: dict[str, Any], hidden: Path, lazy: bool | None) -> Any:
        if self._saves is None:
            self._saves = DcpCheckpointer(options=self._options)
        try:
            return self._saves.save(hidden, state, lazy=lazy)
        except UnsupportedError as error:
            logger.warning("torch.distributed.checkpoint makes this save, and training waits for it: %s", error)
            dcp.save(state, checkpoint_id=hidden)
            done: concurrent.futures.Future[Path] = concurrent.futures.Future()
            done.set_result(hidden)
            return done

    def close(self) -> None:
        """On all ranks.

        Raises:
            CheckpointError: the newest save did not become durable.
        """
        saves, self._saves = self._saves, None
        if saves is not None:
            saves.close()


class NamedLater:
    """A save that is under way: over when all its parts are, and what they have made has its name.

    Attributes:
        stats: of the first part, this rank's part of model and optimizers; None where torch has saved them.
    """

    def __init__(self, parts: list[Any], hidden: Path, path: Path, gives_name: bool = True) -> None:
        self._parts, self._hidden, self._path, self._gives_name = parts, hidden, path, gives_name
        self._future: concurrent.futures.Future[Path] = concurrent.futures.Future()
        self._guard = threading.Lock()
        self._left = len(parts)  # guarded by _guard
        for part in parts:
            part.add_done_callback(self._note)

    @property
    def stats(self) -> ckpt.SaveStats | None:
        return getattr(self._parts[0], "stats", None)

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._future.add_done_callback(lambda _: callback(self))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._future.exception(timeout)

    def _note(self, _: Any) -> None:
        with self._guard:
            self._left -= 1
            if self._left:
                return
        try:
            failed = [error for part in self._parts if (error := part.exception()) is not None]
            if failed:
                raise failed[0]
            if self._gives_name:
                names.name_directory(self._hidden, self._path)
        except BaseException as error:
            if self._gives_name:
                _remove(self._hidden)
            self._future.set_exception(error)
        else:
            self._future.set_result(self._path)


def _discard_behind(parts: list[Any], hidden: Path) -> None:
    """Removes the directory of a save that was not begun as a whole, when what was begun of it has ended."""
    for part in parts:
        part.add_done_callback(lambda _: _remove(hidden))
    if not parts:
        _remove(hidden)


def _remove(hidden: Path) -> None:
    with contextlib.suppress(OSError):
        names.remove(hidden)
