"""Which generations go home, and which are not wanted there any more."""

from __future__ import annotations

import datetime
from collections.abc import Container, Mapping, Sequence

from ckpt.directory.manifest import Manifest
from ckpt.drain.journal import COPYING, Journal
from ckpt.drain.node import Generation, Node

# Beside the one on its way: training must not fill the node because home is slow, or away.
_MOST_WAITING = 2


class Rules:
    """What home wants beside the newest: each n-th step, or one each so many seconds.

    Args:
        committed_s: when the newest checkpoint at home was made that was wanted for its time; 0: never.
    """

    def __init__(self, node: Node, committed_s: float = 0.0) -> None:
        self._steps = node.every_steps
        self._seconds = node.every_s
        self._last_s = committed_s

    def want(self, manifest: Manifest) -> bool:
        if self._steps is not None and manifest.step % self._steps == 0:
            return True
        return self._seconds is not None and created_s(manifest) - self._last_s >= self._seconds

    def wanted(self, generations: Sequence[Generation]) -> set[int]:
        """Sequences; of those that are made shortly after each other, only the first is wanted for its time."""
        found = set()
        for generation in sorted(generations, key=lambda each: each.sequence):
            if self.want(generation.manifest):
                found.add(generation.sequence)
                self._last_s = max(self._last_s, created_s(generation.manifest))
        return found


def created_s(manifest: Manifest) -> float:
    """0 if that cannot be told."""
    try:
        return datetime.datetime.fromisoformat(manifest.created).timestamp()
    except ValueError:
        return 0.0


def superseded(
    waiting: Sequence[Generation], journals: Mapping[int, Journal], wanted: Container[int], newest_at_home: int
) -> dict[int, int]:
    """Of generations that are not home yet, newest first: which are not wanted any more, and what takes their place.

    The one that is being copied goes on, as long as nothing newer is home: else saves that come faster than copies would never
    let any arrive.
    """
    found, rank = {}, 0
    for generation in waiting:
        sequence = generation.sequence
        if sequence in wanted:
            continue
        if newest_at_home > sequence:
            found[sequence] = newest_at_home
        elif journals[sequence].state != COPYING:
            rank += 1
            if rank > _MOST_WAITING:
                found[sequence] = waiting[0].sequence
    return found


def next_one(waiting: Sequence[Generation], journals: Mapping[int, Journal], opened: Sequence[int]) -> Generation | None:
    """The one to copy: what was begun; else the newest that other nodes have begun, so that some become whole; else the newest.

    Args:
        waiting: newest first.
        opened: sequences that other nodes deliver, to which this one has not.
    """
    begun = [generation for generation in waiting if journals[generation.sequence].state == COPYING]
    common = [generation for generation in waiting if generation.sequence in opened]
    return next(iter([*begun, *common, *waiting]), None)
