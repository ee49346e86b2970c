"""When to save: every so many steps, every so many seconds, or as often as pays.

On several ranks the decision must be the same everywhere, although clocks and costs differ. Numbers of steps are the same on
all ranks by themselves. Time is not, so only rank 0's clock counts, and it is asked only at steps that all ranks know before,
its *checks*: each check tells all ranks whether to save now, and at which step the next check is. A check aims at the step at
which the next save will be due, so there is about one for each save, and between checks nothing is exchanged.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

from ckpt.quantities import Duration, parse_duration

logger = logging.getLogger("ckpt")

Agree = Callable[[bytes], bytes]  # rank 0's value, on every rank

_FORMS = "a number of steps (100), a duration ('10min'), 'auto' or Auto(...)"
_COSTS_KEPT = 5  # saves whose median cost is what a save costs
_TOLD_AGAIN = 2  # an interval that has become so many times as long, or as short, is worth a word
_CHECK_GROWTH = 2  # a check is at most so many times as far ahead as the last save, or the start, is back: estimates may be off

now = time.monotonic


@dataclasses.dataclass(frozen=True)
class Auto:
    """Save as often as pays: the interval of Young and Daly, sqrt(2 * cost of a save * mean time between failures).

    The cost is the time that saves were seen to hold up training. Two limits keep the interval from getting too short: the
    share of time spent on saves, and the time that a save takes until it is durable.

    Attributes:
        mtbf: mean time between failures of the whole job, all its machines together; default "6h". A duration as in `every`.
            Four times as much doubles the interval.
        overhead: the largest share of wall time that saves may hold up training, more than 0 and at most 1; default 0.03.

    Raises:
        ValueError, TypeError: a value is impossible.
    """

    mtbf: Duration = "6h"
    overhead: float = 0.03

    def __post_init__(self) -> None:
        parse_duration(self.mtbf, "Auto.mtbf")
        is_number = isinstance(self.overhead, (int, float)) and not isinstance(self.overhead, bool)
        if not is_number or not 0 < self.overhead <= 1:
            raise ValueError(f"Auto.overhead must be more than 0 and at most 1, not {self.overhead!r}")

    def interval_s(self, cost_s: float, durable_s: float) -> float:
        """Seconds from one save to the next, given what one costs and how long it takes to get durable, both in seconds."""
        return self.decide(cost_s, durable_s)[0]

    def decide(self, cost_s: float, durable_s: float) -> tuple[float, str]:
        """The same, and why, in words."""
        best = math.sqrt(2 * cost_s * parse_duration(self.mtbf, "Auto.mtbf"))
        return max(
            (best, f"that loses least if something fails each {self.mtbf}"),
            (cost_s / self.overhead, f"more saves would take more than {self.overhead:.1%} of the time"),
            (durable_s, "the one before is durable only then"),
            key=lambda choice: choice[0],
        )


Every = int | str | datetime.timedelta | Auto


class Interval(Protocol):
    """Decides at each step whether to save. Every rank must ask at the same steps."""

    def is_due(self, step: int) -> bool: ...

    def note_start(self, step: int) -> None:
        """Training begins with `step` steps done: time counts from here."""

    def note_save(self, step: int, pending: Any, blocked_s: float) -> None:
        """A save was begun, and has held up training for so many seconds so far."""


def make_interval(every: Every, agree: Agree | None, *, tells: bool = False) -> Interval:
    """The interval that `every` means.

    Args:
        agree: how ranks agree; None: there is only one.
        tells: whether the log is to say what was decided for "auto"; one rank is enough.

    Raises:
        ValueError, TypeError: `every` is nothing that can be meant.
    """
    if isinstance(every, bool):
        raise TypeError(f"every must be {_FORMS}, not {every!r}")
    if isinstance(every, int):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every}")
        return Steps(every)
    if every == "auto":
        every = Auto()
    if isinstance(every, Auto):
        return TimedInterval(_CostInterval(every, tells), agree)
    if not isinstance(every, (str, datetime.timedelta)):
        raise TypeError(f"every must be {_FORMS}, not {every!r}")
    return TimedInterval(_FixedInterval(_parse_time(every)), agree)


def _parse_time(every: str | datetime.timedelta) -> float:
    """Seconds. What is no duration may have been meant as a number of steps."""
    try:
        return parse_duration(every, "every")
    except ValueError as error:
        raise ValueError(f"{error}. every takes {_FORMS}") from None


class Steps:
    """Every `every` steps, counted from the first of the job, so that a resumed job saves the same steps."""

    def __init__(self, every: int) -> None:
        self._every = every

    def is_due(self, step: int) -> bool:
        return step % self._every == 0

    def note_start(self, step: int) -> None:
        pass

    def note_save(self, step: int, pending: Any, blocked_s: float) -> None:
        pass


class _FixedInterval:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def may_save(self) -> bool:
        return True

    def wait_s(self, elapsed_s: float) -> float:
        """Seconds until the next save is due, `elapsed_s` after the last began; not positive: now."""
        return self._seconds - elapsed_s

    def note(self, pending: Any, blocked_s: float) -> None:
        pass

    def tell(self, step_s: float) -> None:
        pass


class _CostInterval:
    """The interval of an Auto, from what the saves so far have cost."""

    def __init__(self, auto: Auto, tells: bool) -> None:
        self._auto = auto
        self._tells = tells
        self._decided: tuple[float, str] | None = None
        self._told_s: float | None = None
        self._cost_s = 0.0
        self._saves: collections.deque[tuple[Any, float]] = collections.deque(maxlen=_COSTS_KEPT)
        self._durable_s = 0.0

    def may_save(self) -> bool:
        """Not before the newest save is durable, or has failed."""
        return not self._saves or self._saves[-1][0].done()

    def wait_s(self, elapsed_s: float) -> float:
        if not self._saves:
            return 0.0  # what a save costs is learnt from the first
        if not self.may_save():
            return elapsed_s / 2  # check again in a while
        stats = self._saves[-1][0].stats
        if stats.durable_at is not None and stats.started_at is not None:
            self._durable_s = stats.durable_at - stats.started_at
        self._cost_s = statistics.median(blocked_s + pending.stats.fence_s for pending, blocked_s in self._saves)
        self._decided = self._auto.decide(self._cost_s, self._durable_s)
        return self._decided[0] - elapsed_s

    def tell(self, step_s: float) -> None:
        """In the log, when it is known, and when it has changed much.

        Args:
            step_s: what an iteration takes.
        """
        if not self._tells or self._decided is None:
            return
        interval_s, why = self._decided
        if self._told_s is not None and self._told_s / _TOLD_AGAIN < interval_s < self._told_s * _TOLD_AGAIN:
            return
        self._told_s = interval_s
        logger.info(
            "every='auto': a save about every %d steps (%.3g s): %s. A save holds training up for %.3g s, and is durable after "
            "%.3g s",
            *(max(1, math.ceil(interval_s / step_s)), interval_s, why, self._cost_s, self._durable_s),
        )

    def note(self, pending: Any, blocked_s: float) -> None:
        self._saves.append((pending, blocked_s))


class TimedInterval:
    """By rank 0's clock, checked at steps that all ranks know beforehand; see the top of this file.

    With one rank every step is a check.
    """

    def __init__(self, rule: _FixedInterval | _CostInterval, agree: Agree | None) -> None:
        self._rule = rule
        self._agree = agree
        self._began_at = now()  # the last save; before the first, training
        self._began_step = 0  # the steps done then
        self._next_check = 0
        self._start = self._began_at, 0  # of training, and the steps done then

    def note_start(self, step: int) -> None:
        self._began_at, self._began_step, self._next_check = now(), step, step
        self._start = self._began_at, step

    def note_save(self, step: int, pending: Any, blocked_s: float) -> None:
        self._began_at, self._began_step = now() - blocked_s, step
        self._rule.note(pending, blocked_s)

    def is_due(self, step: int) -> bool:
        if self._agree is None:
            due = self._rule.may_save() and self._rule.wait_s(now() - self._began_at) <= 0
            self._tell(step)
            return due
        if step < self._next_check:
            return False
        due, self._next_check = _decode(self._agree(_encode(*self._check(step))))
        self._tell(step)
        return due

    def _tell(self, step: int) -> None:
        began_at, began_step = self._start
        self._rule.tell(max((now() - began_at) / max(1, step - began_step), 1e-9))

    def _check(self, step: int) -> tuple[bool, int]:
        """Whether to save at `step`, and the step to check at next."""
        elapsed_s = now() - self._began_at
        steps = max(1, step - self._began_step)
        step_s = max(elapsed_s / steps, 1e-9)
        wait_s = self._rule.wait_s(elapsed_s)
        due = self._rule.may_save() and wait_s <= step_s / 2  # else the next step would be later than this one is early
        if due:
            wait_s = self._rule.wait_s(0.0)
        ahead = min(round(wait_s / step_s), _CHECK_GROWTH * steps)
        return due, step + max(1, ahead)


def _encode(due: bool, next_check: int) -> bytes:
    return b"%d %d" % (due, next_check)


def _decode(answer: bytes) -> tuple[bool, int]:
    due, next_check = answer.split()
    return due == b"1", int(next_check)
