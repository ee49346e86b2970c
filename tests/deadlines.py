"""How long tests wait for what ends within a known time, on a machine that may be busy."""

from __future__ import annotations

import os
import time
from pathlib import Path

_NOTHING_BESIDE_S = 0.1  # what the work below takes at least where nothing runs beside it, with room for a slow machine
_MOST_TIMES = 10.0


def _times_slower() -> float:
    """How many times longer than on an idle machine something takes here and now: two rounds of a fixed amount of work."""
    begin = time.perf_counter()
    for _ in range(2):
        sum(number * number for number in range(400_000))
    return (time.perf_counter() - begin) / _NOTHING_BESIDE_S


def _runnable_for_each_core() -> float:
    running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    return max(running, os.getloadavg()[0]) / (os.cpu_count() or 1)


def patience(idle_s: float) -> float:
    """A deadline, in seconds, for what ends within `idle_s` on an idle machine unless it hangs.

    Twice that at least: the machine may become busy meanwhile. Ten times that at most: a hang must end.
    """
    return idle_s * min(_MOST_TIMES, 2 * max(1.0, _SLOWER, _runnable_for_each_core()))


_SLOWER = _times_slower()  # measured once by each process
