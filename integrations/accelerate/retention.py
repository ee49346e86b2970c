"""Old states go when the newest one is durable, never before."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import ckpt

from . import places

logger = logging.getLogger("ckpt")

_LONGEST_S = 60.0  # for what is to be removed once all is durable


class Retention:
    """Of the main process."""

    def __init__(self) -> None:
        # The saves behind which old ones go, and whether they are gone.
        self._under_way: list[tuple[ckpt.PendingSave, threading.Event]] = []

    def behind(self, pending: ckpt.PendingSave, newest: Path, limit: int, bundles: ckpt.BundleCheckpointer) -> None:
        """Lets all but so many of the numbered states go when the newest is durable; none, if it does not come so far."""
        ended = threading.Event()
        self._under_way = [*(other for other in self._under_way if not other[1].is_set()), (pending, ended)]

        def remove(done: ckpt.PendingSave) -> None:
            try:
                if done.exception(0) is None:
                    _remove_old(bundles, newest, limit)
            finally:
                ended.set()

        pending.add_done_callback(remove)

    def wait(self) -> None:
        """Until those are gone that are to go behind what is durable by now."""
        for pending, ended in self._under_way:
            if pending.done():
                ended.wait(_LONGEST_S)


def _remove_old(bundles: ckpt.BundleCheckpointer, newest: Path, limit: int) -> None:
    """What cannot be removed is logged."""
    others = [path for path in places.numbered_in(newest.parent) if path != newest]
    for path in others[: max(0, len(others) + 1 - max(1, limit))]:
        try:
            bundles.remove(path)
        except ckpt.CheckpointError as error:
            logger.warning("'%s' should make room for newer checkpoints, and stays: %s", path, error)
