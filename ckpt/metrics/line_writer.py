"""Lines that are written behind the back of who has them: a file system that hangs holds up nobody but this."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

_MOST_WAITING = 1000  # lines; a save takes some 3, of 1.2 KiB


class LineWriter:
    """Its thread lives as long as there is something to be written. It is nobody's to wait for: a daemon.

    Args:
        write: called with one line after the other; raises nothing.
    """

    def __init__(self, write: Callable[[bytes], None], most_waiting: int = _MOST_WAITING) -> None:
        self._write = write
        self._most_waiting = most_waiting
        self._changed = threading.Condition(threading.RLock())  # a signal handler may save. Guards what follows
        self._lines: collections.deque[bytes] = collections.deque()
        self._runs = False
        self._given_up = False

    def put(self, line: bytes) -> bool:
        """Whether it is going to be written: not if too many wait already."""
        with self._changed:
            if self._given_up or len(self._lines) >= self._most_waiting:
                return False
            self._lines.append(line)
            if self._runs:
                return True
            self._runs = True
        try:
            threading.Thread(target=self._run, name="ckpt-events", daemon=True).start()
        except RuntimeError:  # the interpreter is about to end
            with self._changed:
                self._runs, self._given_up = False, True
            return False
        return True

    def _run(self) -> None:
        while (line := self._next()) is not None:
            self._write(line)

    def _next(self) -> bytes | None:
        with self._changed:
            if self._lines and not self._given_up:
                return self._lines.popleft()
            self._runs = False
            self._changed.notify_all()
            return None

    def close(self, timeout_s: float) -> bool:
        """Whether all has been written by then. What has not is dropped, but for the line that hangs."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._runs, timeout_s)
            self._given_up = True
            return done
