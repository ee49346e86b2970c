"""Whether something may still come home from nodes: who carries it on from there must not end before."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from ckpt.directory.publish_lock import FOLDER
from ckpt.directory.run_file import find_run
from ckpt.directory.step_names import names_in
from ckpt.errors import CheckpointError

_GRACE_S = 60.0  # from the end of the training until a drain of a node has begun to deliver what was saved last
_PATIENCE_S = 600.0  # with a delivery of which nothing more comes


class ComingHome:
    """
    Args:
        clock: seconds.
    """

    def __init__(self, home: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._home = home
        self._clock = clock
        self._seen: frozenset[tuple[str, str, int, int]] | None = None
        self._since = 0.0

    def reset(self) -> None:
        """Somebody trains."""
        self._seen = None

    def may_go_on(self) -> bool:
        """To be asked again and again once nobody trains. At the first time, and whenever something has come: yes."""
        try:
            run = find_run(self._home)
        except CheckpointError:
            run = None
        if run is None:
            return False
        seen = _signs(self._home / FOLDER / run)
        if seen != self._seen:
            self._seen, self._since = seen, self._clock()
            return True
        return self._clock() - self._since < (_PATIENCE_S if seen else _GRACE_S)


def _signs(inboxes: Path) -> frozenset[tuple[str, str, int, int]]:
    """What lies there of deliveries, and how far it is."""
    found = set()
    with contextlib.suppress(OSError):
        for inbox in names_in(inboxes):
            if inbox.isdecimal():
                found.add((inbox, "", 0, 0))
                with contextlib.suppress(OSError), os.scandir(inboxes / inbox) as entries:
                    for entry in entries:
                        stat = entry.stat(follow_symlinks=False)
                        found.add((inbox, entry.name, stat.st_size, stat.st_mtime_ns))
    return frozenset(found)
