"""Which checkpoints of a directory stay: the newest, each n-th step, the best by a number, and what somebody went back to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from ckpt.directory.manifest import Manifest

MIN, MAX = "min", "max"
_MODES = (MIN, MAX)


def _is_whole(_: Manifest) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What is kept for any of these reasons stays.

    Attributes:
        newest: so many, by when they were committed; None: all.
        every: steps that are multiples of it; None: none.
        best: so many, by the number `by` of their metrics; None: none.
        mode: "min": the lowest are the best; "max": the highest.
        pinned: sequences that stay whatever else holds: what jobs have gone back to, as going_back.py knows.

    Raises:
        TypeError, ValueError: one of them cannot be.
    """

    newest: int | None = None
    every: int | None = None
    best: int | None = None
    by: str = ""
    mode: str = MIN
    pinned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not _is_count_or_none(self.newest):
            raise ValueError(f"keep must be at least 1, or None to keep all, but is {self.newest!r}")
        for name, value in (("keep_every", self.every), ("keep_best", self.best)):
            if not _is_count_or_none(value):
                raise ValueError(f"{name} must be at least 1, or None, but is {value!r}")
        if not isinstance(self.by, str):
            raise TypeError(f"best_by must be the name of a metric, such as 'loss', not {self.by!r}")
        if (self.best is None) != (not self.by):
            raise ValueError(
                "keep_best says how many checkpoints stay, best_by by which of the metrics= of save(), as in keep_best=1, "
                f"best_by='loss': give both or neither, not {self.best!r} and {self.by!r}"
            )
        if self.mode not in _MODES:
            raise ValueError(f"best_mode must be 'min' (the lowest is the best) or 'max', not {self.mode!r}")

    def with_pinned(self, *sequences: int) -> Keeping:
        return dataclasses.replace(self, pinned=tuple(sorted({*self.pinned, *sequences})))

    def best_of(self, manifests: Sequence[Manifest], is_whole: Callable[[Manifest], bool] = _is_whole) -> set[int]:
        """Sequences. Of equals the newer is better.

        Args:
            is_whole: one that is not stays if it would be among them, and stands in for none of them.
        """
        sign = 1 if self.mode == MIN else -1
        known = {each.sequence: each for each in manifests} if self.best is not None else {}  # each once
        scores = [(dict(each.metrics).get(self.by), each) for each in known.values()]
        finite = [(sign * score, -each.sequence) for score, each in scores if score is not None and math.isfinite(score)]
        found: set[int] = set()
        whole = 0
        for _, number in sorted(finite):
            if whole == self.best:
                break
            found.add(-number)
            whole += is_whole(known[-number])
        return found

    def wants(self, manifest: Manifest, others: Sequence[Manifest]) -> bool:
        """Whether it stays, however old it is.

        Args:
            others: that are there.
        """
        if self.every is not None and manifest.step % self.every == 0:
            return True
        return manifest.sequence in self.pinned or manifest.sequence in self.best_of([*others, manifest])

    def reasons(
        self,
        manifests: Sequence[Manifest],
        is_whole: Callable[[Manifest], bool] = _is_whole,
        damaged: Container[int] = (),
    ) -> list[str]:
        """Why each of them stays, in words; empty: nothing keeps it.

        Args:
            manifests: newest commit first.
            is_whole: see best_of().
            damaged: sequences of those that stand in for none of the newest: one that is among them stays all the same.
        """
        best = self.best_of(manifests, is_whole)
        found, newer = [], 0
        for manifest in manifests:
            found.append(self._reason(newer, manifest, best))
            newer += manifest.sequence not in damaged
        return found

    def _reason(self, number: int, manifest: Manifest, best: set[int]) -> str:
        if self.newest is None or number < self.newest:
            several = self.newest is not None and self.newest > 1
            return f"one of the newest {self.newest}" if several else "the newest" if number == 0 else "all are kept"
        if self.every is not None and manifest.step % self.every == 0:
            return f"its step is a multiple of {self.every}"
        if manifest.sequence in best:
            return f"one of the best {self.best} by {self.by}" if self.best != 1 else f"the best by {self.by}"
        return "a job has gone back to it" if manifest.sequence in self.pinned else ""

    def to_json(self) -> dict[str, Any]:
        """What is kept beside the newest; empty if nothing is."""
        said: dict[str, Any] = {}
        if self.every is not None:
            said["every"] = self.every
        if self.best is not None:
            said |= {"best": self.best, "by": self.by, "mode": self.mode}
        return said | ({"pinned": list(self.pinned)} if self.pinned else {})

    @staticmethod
    def parse(newest: int | None, said: Mapping[str, Any]) -> Keeping:
        """
        Args:
            said: by to_json().

        Raises:
            TypeError, ValueError: it was not.
        """
        pinned = tuple(int(sequence) for sequence in said.get("pinned", ()))
        by, mode = str(said.get("by", "")), str(said.get("mode", MIN))
        return Keeping(newest, said.get("every"), said.get("best"), by, mode, pinned)


def _is_count_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def checked_metrics(metrics: Mapping[str, Any] | None, keeping: Keeping) -> tuple[tuple[str, float], ...]:
    """As Manifest has them. What is no finite number is left out: nothing is better or worse than it.

    Args:
        metrics: numbers by name, or tensors of one element.

    Raises:
        TypeError: they are not.
        ValueError: the one by which the best is chosen is not among them; or one is too large for a float.
    """
    if metrics is None:
        return ()
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(f"metrics must be a dict of names and numbers, such as {{'loss': 0.3}}, not {metrics!r}")
    if keeping.by and keeping.by not in metrics:
        raise ValueError(f"metrics= has {sorted(metrics)}, and best_by= asks for {keeping.by!r}: give that, too, or no metrics")
    found = {name: _number(name, value) for name, value in metrics.items()}
    return tuple((name, value) for name, value in found.items() if math.isfinite(value))


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"the metric {name!r} is too large for a floating-point number") from error
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of a tensor of several elements
        raise TypeError(f"the metric {name!r} must be a number, but is {value!r}") from error
