"""In a drain that a test has prepared: it stops itself where the test wants to find it."""

from __future__ import annotations

import os
import signal

from ckpt.storage import durable


def hold_at(point: str) -> None:
    """Once, at this crash point."""
    pass_by = durable.crash_point

    def crash_point(name: str) -> None:
        pass_by(name)
        if name == point:
            durable.crash_point = pass_by
            os.kill(os.getpid(), signal.SIGSTOP)

    durable.crash_point = crash_point
