"""The end of a coordinator, which waits for ranks that have not read the last word of rank 0."""

from __future__ import annotations

import contextlib
import threading

from ckpt.coordinator.base import Coordinator
from ckpt.coordinator.key_cleanup import KeyCleanup, Spent
from ckpt.coordinator.waiting import Deadline, Interrupt, InterruptibleDeadline
from ckpt.errors import CheckpointError, ClosedError

LINGER_S = 5.0  # how long rank 0 stays at close() for ranks that have not read its last word
_CLOSING = ".close/"


class OrderlyClose:
    """The end of a coordinator: done once, and not before the others have read rank 0's last word, if they still live.

    Attributes:
        interrupt: says that the end is near; the last meeting of all is still waited for.
    """

    def __init__(self, what: str) -> None:
        self.interrupt = Interrupt()
        self._what = what
        self._lock = threading.Lock()
        self._closed = False  # guarded by _lock

    def check(self) -> None:
        """Raises ClosedError after the end."""
        if self._closed:
            raise ClosedError(f"{self._what} is closed; make a new one")

    def deadline_for(self, key: str, timeout_s: float) -> Deadline:
        """How long to wait for other ranks at this key.

        Raises:
            ClosedError: not at all.
        """
        return Deadline(timeout_s) if key == _CLOSING else InterruptibleDeadline(timeout_s, self.interrupt, key)

    def close(self, coordinator: Coordinator, cleanup: KeyCleanup) -> Spent | None:
        """Tells rank 0 that this rank is done, or waits on rank 0 until all are; None if that was done before.

        Returns what rank 0 may delete: nothing while ranks are missing, for they may still come and read.
        """
        with self._lock:
            if self._closed:
                return None
            spent = Spent([], [])
            with contextlib.suppress(CheckpointError):
                if coordinator.world_size > 1 and not (coordinator.rank == 0 and cleanup.all_read):
                    coordinator.gather(_CLOSING, b"", LINGER_S)
                spent = cleanup.close()
            self._closed = True
            return spent
