"""When to try again what has failed, and whether that makes sense."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable

_SHORTEST_S = 1.0
_LONGEST_S = 300.0
# What a person has to change. All else may pass by itself: a disk that is full, a server that is away.
_PERMANENT = (errno.EACCES, errno.EROFS, errno.EPERM)


def is_permanent(code: int) -> bool:
    return code in _PERMANENT


class Backoff:
    """Exponential, with full jitter: many nodes that have failed at once do not come back at once.

    Args:
        chance: gives a number between 0 and 1.
        clock: seconds.
    """

    def __init__(self, chance: Callable[[], float] = random.random, clock: Callable[[], float] = time.monotonic) -> None:
        self._chance = chance
        self._clock = clock
        self.failures = 0  # in a row
        self._until = 0.0

    def fail(self) -> float:
        """Returns for how many seconds nothing is to be tried."""
        longest = min(_LONGEST_S, _SHORTEST_S * 2 ** min(self.failures, 20))
        self.failures += 1
        delay = self._chance() * longest
        self._until = self._clock() + delay
        return delay

    @property
    def is_worth_a_word(self) -> bool:
        """Whether the number of failures has doubled since the last one that was."""
        return self.failures & (self.failures - 1) == 0

    @property
    def waits(self) -> bool:
        return self._clock() < self._until

    def succeed(self) -> None:
        self.failures, self._until = 0, 0.0
