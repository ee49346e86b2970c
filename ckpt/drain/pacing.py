"""How fast to copy: as fast as possible, so many bytes a second, or as fast as the training does not feel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ckpt.errors import StorageError
from ckpt.storage.pace_file import Pace as Page
from ckpt.storage.pace_file import PaceReader

_JUDGED_BY = 5  # iterations, by their median: one alone differs from the next by more than a drain costs
_SLOWED_DOWN = 1.02  # of the median iteration without a drain: then half the rate
_UNTOUCHED = 1.01  # below: a tenth of the peak more
_PLAINLY_SLOWER = 1.10  # by one iteration alone
_SILENT_FOR = (
    4  # so many medians without the end of an iteration: nobody is slowed down, as during an evaluation, or at the end
)
_LEAST_SILENCE_S = 1.0
_FIRST_SHARE = 0.25  # of the peak, until the training has shown that it does not feel that
_LEAST_SHARE = 0.05  # of the peak
_LONGEST_PAUSE_S = 1.0  # for one fence or capture
_LOOK_S = 0.005


class Pace(Protocol):
    def wait(self, size: int) -> None:
        """Until so many bytes more may be copied."""

    def note(self, size: int, seconds: float) -> None:
        """That so many were copied in this time."""


class FixedRate:
    """
    Args:
        rate: bytes a second.
        sleep, clock: in seconds.
    """

    def __init__(
        self, rate: float, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self._sleep = sleep
        self._clock = clock
        self._free_at = 0.0  # when all so far has taken its time

    def wait(self, size: int) -> None:
        """See Pace."""
        now = self._clock()
        if self._free_at > now:
            self._sleep(self._free_at - now)
        self._free_at = max(self._free_at, now) + size / self.rate  # what was not used is not saved up

    def note(self, size: int, seconds: float) -> None:
        """See Pace."""


class AutoRate:
    """Follows what the training says in its pace file: see pace_file.py. Without one there is no limit.

    Args:
        find_page: returns what it says; None: nobody trains.
    """

    def __init__(
        self,
        find_page: Callable[[], Page | None],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find_page = find_page
        self._sleep = sleep
        self._clock = clock
        self._limit = FixedRate(1.0, sleep, clock)
        self._seen = -1
        self._heard_at = clock()  # of an iteration, or when its absence was last taken for silence
        self._shares: list[float] = []  # of the median without a drain: iterations since the last judgement
        self._ignored = -1  # the counter of one who has died in a capture
        self.peak = 0.0  # bytes a second, measured
        self.rate: float | None = None  # None: no limit
        self._begins = True  # beside a training of which nothing is known yet

    def wait(self, size: int) -> None:
        """See Pace."""
        page = self._after_capture()
        if page is None:
            self.rate, self._begins = None, True
            return
        if self._begins and self.peak > 0:
            self.rate, self._begins = _FIRST_SHARE * self.peak, False
        if page.iterations != self._seen:
            self._seen, self._heard_at = page.iterations, self._clock()
            self._note_iteration(page)
        elif self._clock() - self._heard_at > max(_LEAST_SILENCE_S, _SILENT_FOR * page.median_s):
            self._heard_at = self._clock()
            self._judge(1.0)
        if self.rate is not None:
            self._limit.rate = self.rate
            self._limit.wait(size)

    def note(self, size: int, seconds: float) -> None:
        """See Pace."""
        if seconds > 0:
            self.peak = max(self.peak, size / seconds)

    def _after_capture(self) -> Page | None:
        page, end = self._find_page(), self._clock() + _LONGEST_PAUSE_S
        while page is not None and page.capturing and page.counter != self._ignored:
            if self._clock() >= end:
                self._ignored = page.counter
                break
            self._sleep(_LOOK_S)
            self._heard_at = self._clock()  # it is at work
            page = self._find_page()
        return page

    def _note_iteration(self, page: Page) -> None:
        if self.peak <= 0 or page.median_s <= 0 or page.iteration_s <= 0:
            return
        self._shares.append(page.iteration_s / page.median_s)
        if self._shares[-1] > _PLAINLY_SLOWER:
            self._judge(self._shares[-1])
        elif len(self._shares) >= _JUDGED_BY:
            self._judge(statistics.median(self._shares))

    def _judge(self, share: float) -> None:
        self._shares.clear()
        now = self.peak if self.rate is None else self.rate
        if share > _SLOWED_DOWN:
            self.rate = max(_LEAST_SHARE * self.peak, now / 2)
        elif share < _UNTOUCHED and self.rate is not None:
            faster = now + self.peak / 10
            self.rate = None if faster >= self.peak else faster


class PaceFile:
    """Finds the page as soon as there is one.

    Args:
        is_trained: whether anybody is there who writes it.
    """

    def __init__(self, path: Path, is_trained: Callable[[], bool]) -> None:
        self._path = path
        self._is_trained = is_trained
        self._reader: PaceReader | None = None

    def read(self) -> Page | None:
        if not self._is_trained():
            return None
        if self._reader is None:
            try:
                self._reader = PaceReader(self._path)
            except StorageError:
                return None
        return self._reader.read()
