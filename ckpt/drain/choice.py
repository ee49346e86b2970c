"""Which generations go home, and which are not wanted there any more."""

from __future__ import annotations

import datetime
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Protocol

from ckpt.directory.keeping import Keeping
from ckpt.directory.manifest import Manifest
from ckpt.directory.step_names import name_at_home
from ckpt.drain.journal import COPIED, COPYING, Journal
from ckpt.drain.node import Generation

# Beside the one on its way: training must not fill the node because home is slow, or away.
_MOST_WAITING = 2
# Beside one that may become whole next: a node that is silent must not let home and the other nodes fill.
_MOST_DELIVERED = 2


class Wishes(Protocol):
    """Each n-th step, one each so many seconds, or neither."""

    @property
    def every_steps(self) -> int | None: ...

    @property
    def every_s(self) -> float | None: ...


class Rules:
    """What home wants beside the newest: each n-th step, or one at least each so many seconds; and what is to stay there.

    Args:
        times: when the checkpoints at home were made.
        keeping: of home.
        there: the checkpoints at home, for `keeping`.
    """

    def __init__(
        self, node: Wishes, times: Iterable[float] = (), keeping: Keeping | None = None, there: Iterable[Manifest] = ()
    ) -> None:
        self._steps = node.every_steps
        self._seconds = node.every_s
        self._times = list(times)
        self._keeping = keeping or Keeping()
        self._there = list(there)

    def want(self, manifest: Manifest) -> bool:
        if self._keeping.wants(manifest, self._there):
            return True
        if self._steps is not None and manifest.step % self._steps == 0:
            return True
        if self._seconds is None:
            return False
        made = created_s(manifest)
        return not any(made - self._seconds < time <= made for time in self._times)

    def wanted(self, generations: Sequence[Generation]) -> set[int]:
        """Sequences; of those that are made shortly after each other, only the first is wanted for its time."""
        found = set()
        self._there += [generation.manifest for generation in generations]
        for generation in sorted(generations, key=lambda each: each.sequence):
            if self.want(generation.manifest):
                found.add(generation.sequence)
                self._times.append(created_s(generation.manifest))
        return found


def newest_of_each(generations: Sequence[Generation]) -> list[Generation]:
    """Of those that are called the same at home, only the newest can be there.

    Args:
        generations: newest first.
    """
    found: dict[str, Generation] = {}
    for generation in generations:
        found.setdefault(name_at_home(generation.manifest), generation)
    return [*found.values()]


def created_s(manifest: Manifest) -> float:
    """0 if that cannot be told."""
    try:
        return datetime.datetime.fromisoformat(manifest.created).timestamp()
    except ValueError:
        return 0.0


def superseded(
    waiting: Sequence[Generation],
    journals: Mapping[int, Journal],
    wanted: Container[int],
    opened: Container[int],
    newest_at_home: int,
) -> dict[int, int]:
    """Of generations that are not home yet, newest first: which are not wanted any more, and what takes their place.

    The one that is being copied goes on, as long as nothing newer is home: else saves that come faster than copies would never
    let any arrive. So does what other nodes have begun: they wait for it.
    """
    found, rank = {}, 0
    for generation in waiting:
        sequence = generation.sequence
        if sequence in wanted:
            continue
        if newest_at_home > sequence:
            found[sequence] = newest_at_home
        elif journals[sequence].state != COPYING and sequence not in opened:
            rank += 1
            if rank > _MOST_WAITING:
                found[sequence] = waiting[0].sequence
    return found


def next_one(
    waiting: Sequence[Generation],
    journals: Mapping[int, Journal],
    wanted: Container[int],
    opened: Container[int],
    unwanted: Iterable[int],
) -> Generation | None:
    """The one to copy: what was begun; else the newest that other nodes have begun, so that some become whole; else the newest.

    Nothing older than what this node has delivered, nor anything while much of that lacks the parts of other nodes, unless a
    rule wants it, or others have begun it: they have their reasons.

    Args:
        waiting: newest first.
        opened: sequences that other nodes deliver, to which this one has not.
        unwanted: what this node has delivered, is not whole, and no rule wants.
    """
    begun = [generation for generation in waiting if journals[generation.sequence].state == COPYING]
    common = [generation for generation in waiting if generation.sequence in opened]
    delivered = max((sequence for sequence, journal in journals.items() if journal.state == COPIED), default=-1)
    places = [journals[sequence].place for sequence in unwanted]

    def may_begin(sequence: int) -> bool:
        return sequence > delivered and places.count(journals[sequence].place) <= _MOST_DELIVERED

    newer = [each for each in waiting if each.sequence in wanted or may_begin(each.sequence)]
    return next(iter([*begun, *common, *newer]), None)
