"""A drain looks each second what is new, and at once if somebody touches a file."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from ckpt.drain.journal import FOLDER
from ckpt.drain.stopping import Stop

WAKE = "wake"
_POLL_S = 0.05
_LOOK_S = 1.0


class Wakeful:
    """
    Args:
        root: in whose journal folder the file lies.
    """

    def __init__(self, root: Path, stop: Stop) -> None:
        self._path = root / FOLDER / WAKE
        self._stop = stop
        self._seen = 0

    def look(self) -> None:
        """To be called before the work: what wakes it meanwhile counts."""
        self._seen = self._time()

    def wait(self) -> None:
        """Until it is time to look again."""
        end = time.monotonic() + _LOOK_S
        while not self._stop.requested and time.monotonic() < end and self._time() == self._seen:
            self._stop.sleep(_POLL_S)

    def _time(self) -> int:
        with contextlib.suppress(OSError):
            return os.stat(self._path).st_mtime_ns
        return 0
