"""Which cases of a matrix run always, and which only with `-m slow`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[tuple[Any, ...]], run: Container[tuple[Any, ...]]) -> list[Any]:
    """For parametrize: all of them, but what is not in `run` only with `-m slow`."""
    return [pytest.param(*case, marks=[] if case in run else pytest.mark.slow) for case in cases]


def in_turn(points: Iterable[Any]) -> list[tuple[Any, int]]:
    """Each with rank 0 or 1, in turn."""
    return [(point, number % 2) for number, point in enumerate(points)]
