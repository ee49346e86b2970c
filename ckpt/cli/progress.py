"""How far something has come: a bar on a terminal, if tqdm is installed; else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Progress:
    """A context manager. Called with each number of bytes that are done.

    Args:
        total: bytes; None: not known.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, file=sys.stderr, leave=False)

    def __call__(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Callable[[int], None]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
