"""Which saves go straight home, past the disks of nodes: those for which one has no room, and some behind one that failed.

All ranks must take the same way, and save() waits for nobody. So rank 0 says with the verdict on one save which way a later one
takes: the one whose save() cannot be called before this one is over, because only so many may be in flight.

With `Options(when_busy="skip")` calls that are skipped on one rank come between, and nobody knows how many: a save may then
begin on one rank before that verdict is heard, and on another behind it. If they take different ways, the save fails on all of
them, and the next finds them agreed. A vote that prevents this would have to know on all ranks who has heard what, so save()
would have to wait for the slowest.

Behind a failure one save goes home, behind the next one two, then four: a disk that comes back is found again, and one that
does not costs little.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt.commit.conversation import Failure

logger = logging.getLogger("ckpt")

_MOST_DOUBLINGS = 6


class BypassVote:
    """Of one Checkpointer.

    Args:
        ahead: how many saves may be in flight.
        why_not: why this rank's node takes no more; empty if it does.
    """

    def __init__(self, ahead: int, why_not: Callable[[], str]) -> None:
        self._ahead = ahead
        self._why_not = why_not
        self._lock = threading.Lock()
        self._said: dict[int, str] = {}  # by the number of a save: why it goes home; empty if it does not. Guarded by _lock
        self._failures = 0  # on rank 0, as is what follows
        self._left = 0  # saves that are still to go home for the last failure
        self._cause = ""
        self._warned = ""

    def reason(self, number: int) -> str:
        """Why save `number` goes home; empty if it goes by way of the nodes."""
        with self._lock:
            known = max((known for known in self._said if known <= number), default=None)
            return "" if known is None else self._said[known]

    def say(self) -> dict[str, Any]:
        """What a rank answers beside what it has written."""
        return {"full": self._why_not()}

    def decide(self, failure: Failure | None, answers: Sequence[Mapping[str, Any]], by_nodes: bool) -> dict[str, Any]:
        """On rank 0: what it tells beside its verdict.

        Args:
            by_nodes: whether this save went by way of the nodes.
        """
        if by_nodes and failure is not None and not failure.skipped:
            self._left, self._cause = 1 << min(self._failures, _MOST_DOUBLINGS), failure.text
            self._failures += 1
        elif by_nodes and failure is None:
            self._failures = self._left = 0
        elif self._left:
            self._left -= 1
        full = next((answer["full"] for answer in answers if answer.get("full")), "")
        return {"bypass": full or (self._cause if self._left else "")}

    def hear(self, number: int, said: Mapping[str, Any]) -> None:
        """With the verdict on save `number`."""
        if (reason := said.get("bypass")) is None:
            return
        with self._lock:
            self._said[number + self._ahead + 1] = reason
            for old in [old for old in self._said if old < number - 1]:
                del self._said[old]
        if reason != self._warned:
            if reason:
                logger.warning("saves go straight home for now, past the disks of the nodes: %s", reason)
            elif self._warned:
                logger.info("saves go by way of the disks of the nodes again")
            self._warned = reason
