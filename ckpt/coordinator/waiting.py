"""How long to wait for other ranks: deadlines, the word that ends a wait early, and the sleeps of a loop that polls."""

from __future__ import annotations

import threading
import time

from ckpt.errors import ClosedError

POST_S = 5.0  # how long what is only posted may take after interrupt()
GRACE_S = 0.5  # after its deadline, for a call that ends by itself to come back before it is abandoned


class Interrupt:
    """The word that this process waits for no other rank any more. For several threads; it cannot be taken back."""

    def __init__(self) -> None:
        self._said = threading.Event()
        self.at = float("inf")  # on the monotonic clock

    def say(self) -> None:
        self.at = min(self.at, time.monotonic())
        self._said.set()

    @property
    def said(self) -> bool:
        return self._said.is_set()

    def sleep(self, seconds: float) -> None:
        """Or until it is said."""
        self._said.wait(seconds)


class Deadline:
    """A moment on the monotonic clock.

    Attributes:
        timeout_s: how far away it was at first, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._at - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left_s == 0.0

    def check(self) -> None:
        """Raises ClosedError if the wait is given up before its time; see InterruptibleDeadline."""

    def sleep(self, seconds: float) -> None:
        """But not beyond it.

        Raises:
            ClosedError: as check() does.
        """
        time.sleep(min(seconds, self.left_s))


class InterruptibleDeadline(Deadline):
    """How long to wait for other ranks: until a moment, or until the interrupt."""

    def __init__(self, timeout_s: float, interrupt: Interrupt, key: str) -> None:
        super().__init__(timeout_s)
        self._interrupt = interrupt
        self._key = key
        self.check()

    def check(self) -> None:
        if self._interrupt.said:
            raise ClosedError(f"the wait for other ranks, '{self._key}', was given up: this process is closing its checkpoints")

    def sleep(self, seconds: float) -> None:
        self._interrupt.sleep(min(seconds, self.left_s))
        self.check()


class PostDeadline(Deadline):
    """How long a post may take: until a moment, but after the interrupt POST_S at most, with the grace."""

    def __init__(self, timeout_s: float, interrupt: Interrupt) -> None:
        super().__init__(timeout_s)
        self._interrupt = interrupt
        self._began = time.monotonic()

    @property
    def left_s(self) -> float:
        last = max(self._began, self._interrupt.at) + POST_S - GRACE_S
        return max(0.0, min(self._at, last) - time.monotonic())


class Pace:
    """The growing sleeps of a loop that polls: prompt at first, then about a percent of a core.

    Args:
        first_s, longest_s: the first sleep and the one they grow to, seconds.
    """

    PROMPT_S = 0.05  # how long a wait may be prompt
    SHARE = 100  # after that, a look that costs 1 ms is followed by at least 100 ms of sleep,
    AT_MOST_S = 0.25  # but not by more than this

    def __init__(self, deadline: Deadline, first_s: float, longest_s: float) -> None:
        self._deadline = deadline
        self._first_s = self._sleep_s = first_s
        self._longest_s = longest_s
        self._prompt = Deadline(self.PROMPT_S)
        self._woke = time.thread_time()

    def rest(self, found: bool = False) -> bool:
        """Sleeps; False at once if the deadline is over: there has been a look since.

        Args:
            found: the last look has found something, so the next may come soon.

        Raises:
            ClosedError: the wait is given up.
        """
        if self._deadline.over:
            return False
        self._sleep_s = self._first_s if found else min(self._sleep_s * 1.5, self._longest_s)
        cost_s = 0.0 if found or not self._prompt.over else time.thread_time() - self._woke
        self._deadline.sleep(max(self._sleep_s, min(self.SHARE * cost_s, self.AT_MOST_S)))
        self._woke = time.thread_time()
        return True
