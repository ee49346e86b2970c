"""How the training runs, noted at each fence for the drain, which must not slow it down: see ckpt/storage/pace_file.py."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

from ckpt.errors import StorageError
from ckpt.storage.pace_file import PaceWriter

logger = logging.getLogger("ckpt")

_REMEMBERED = 31  # iterations, for a median
_FEWEST = 3
_SLOWED_DOWN = 1.02  # as the drain has it
# So many slow iterations in a row while something drains: by then the drain is at its lowest rate, and it is the training that
# has changed. The median is taken anew from the last of them, else the drain would stay there for good.
_SLOW_FOR_GOOD = 64
_TAKES_OVER_AFTER = 8  # fences of one other optimizer, if the one that gives the beat is silent


class TrainingPace:
    """Of one process of a node, from its first iteration on: before the first save nothing drains, and that is what counts.

    Args:
        is_draining: whether anything is on its way home just now; cheap.
    """

    def __init__(self, is_draining: Callable[[], bool]) -> None:
        self._is_draining = is_draining
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may save
        self._writer: PaceWriter | None = None  # what follows, too, is guarded by _lock
        self._beat: Hashable = None
        self._others: dict[Hashable, int] = {}  # their fences since the last one of the beat
        self._began: float | None = None
        self._drained = False  # when this iteration began
        self._captured_s = 0.0  # in this iteration
        self._capturing = 0
        self._undisturbed: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._slow: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._slow_in_a_row = 0
        self.iterations = 0
        self.iteration_s = 0.0
        self.median_s = 0.0

    def begin(self, path: Path) -> None:
        """From now on the drain is told. A page that cannot be made is logged: then the drain knows no limit."""
        with self._lock:
            if self._writer is None and os.getpid() == self._pid:
                try:
                    self._writer = PaceWriter(path)
                except StorageError as error:
                    logger.warning("the drain is not told how the training runs, and may slow it down: %s", error)
                else:
                    self._write()

    def close(self) -> None:
        """Safe to call again, and in a forked child."""
        if os.getpid() == self._pid:
            with self._lock:
                writer, self._writer = self._writer, None
                if writer is not None:
                    writer.close()

    def note_fence(self, now: float, beat: Hashable = None) -> None:
        """An iteration ends here. Takes microseconds.

        Args:
            now: monotonic seconds, at the beginning of the fence.
            beat: tells optimizers apart: an iteration may step several, and only one of them gives the beat.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._is_beat(beat):
                return
            began, self._began = self._began, now
            drained_before, self._drained = self._drained, self._is_draining()
            iteration_s = 0.0 if began is None else now - began - self._captured_s
            self._captured_s = 0.0
            if iteration_s <= 0.0:
                return
            self.iteration_s = iteration_s
            self.iterations += 1
            self._learn(iteration_s, drained_before or self._drained)
            self._write()

    @contextlib.contextmanager
    def capturing(self, clock: Callable[[], float]) -> Iterator[None]:
        """Around a fence, or what of a save the training waits for: the drain pauses, and this time is not the iteration's.

        Args:
            clock: that of note_fence().
        """
        began = clock()
        self._capture(+1)
        try:
            yield
        finally:
            self._capture(-1, clock() - began)

    def _capture(self, change: int, seconds: float = 0.0) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._capturing += change
            if self._capturing == (change > 0):  # the outermost one
                self._captured_s += seconds
                self._write()

    def _is_beat(self, beat: Hashable) -> bool:
        if self._began is None or beat == self._beat:
            self._beat = beat
            self._others.clear()
            return True
        self._others[beat] = self._others.get(beat, 0) + 1
        if self._others[beat] < _TAKES_OVER_AFTER:
            return False
        self._beat, self._began = beat, None  # its iteration begins here
        self._others.clear()
        return True

    def _learn(self, iteration_s: float, drained: bool) -> None:
        if not drained:
            self._forget_slow()
            self._undisturbed.append(iteration_s)
        elif self.median_s and iteration_s > _SLOWED_DOWN * self.median_s:
            self._slow.append(iteration_s)
            self._slow_in_a_row += 1
            if self._slow_in_a_row < _SLOW_FOR_GOOD:
                return
            self._undisturbed.clear()
            self._undisturbed.extend(self._slow)
            self._forget_slow()
        else:
            self._forget_slow()
            return
        if len(self._undisturbed) >= _FEWEST:
            self.median_s = sorted(self._undisturbed)[len(self._undisturbed) // 2]

    def _forget_slow(self) -> None:
        if self._slow_in_a_row:
            self._slow_in_a_row = 0
            self._slow.clear()

    def _write(self) -> None:
        if self._writer is not None:
            self._writer.write(self.iterations, self.iteration_s, self.median_s, self._capturing > 0)
