"""A request to end that is heard between any two chunks, and in every wait."""

from __future__ import annotations

import time

from ckpt.errors import CheckpointError

_SLICE_S = 0.05


class StoppedError(CheckpointError):
    """The drain was asked to end; what was copied is noted."""


class Stop:
    """set() may be called by a signal handler."""

    def __init__(self) -> None:
        self.requested = False

    def set(self) -> None:
        self.requested = True

    def sleep(self, seconds: float) -> None:
        """Ends early if it is requested."""
        end = time.monotonic() + seconds
        while not self.requested and (left := end - time.monotonic()) > 0:
            time.sleep(min(_SLICE_S, left))
