"""How far reading has come, for who asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from ckpt.storage.watching import watched

Told = Callable[[int, int], object]  # called with the bytes that have been read, and all that are to be


class Progress:
    """A context manager.

    Args:
        told: True: a bar of tqdm on standard error; None or False: nothing.

    Raises:
        ImportError: there is no tqdm.
        TypeError: it is nothing of all that.
        Whatever `told` raises, at the end of the block: it is not called again, and what is read comes to its end.
    """

    def __init__(self, told: Told | bool | None) -> None:
        if not (told is None or isinstance(told, bool) or callable(told)):
            raise TypeError(f"progress= takes a function of two numbers, or True for a bar of tqdm, not {told!r}")
        self._bar: Any = _bar() if told is True else None
        self._told = self._move if told is True else told if callable(told) else None
        self._done = self._total = 0
        self._failure: Exception | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        failure, self._failure = self._failure, None
        if failure is not None and error is None:
            raise failure

    def begin(self, total: int) -> None:
        """All that is to be read now; whatever has been read before counts no more."""
        self._done, self._total = 0, total
        self._tell(0)

    @contextlib.contextmanager
    def reading(self, size: int, counter: Callable[[], int] | None = None) -> Iterator[None]:
        """So many bytes are read meanwhile.

        Args:
            counter: says how many have been so far, from whatever number on; called by another thread.
        """
        if self._told is None:
            yield
            return
        with contextlib.nullcontext() if counter is None else watched(counter, lambda more: self._tell_more(more, size)):
            yield
        self._done += size
        self._tell(self._done)

    def _tell_more(self, more: int, size: int) -> None:
        self._tell(self._done + min(more, size))

    def _tell(self, done: int) -> None:
        if self._told is not None:
            try:
                self._told(min(done, self._total), self._total)
            except Exception as error:
                self._failure, self._told = error, None

    def _move(self, done: int, total: int) -> None:
        if self._bar.total != total:
            self._bar.reset(total)
        self._bar.update(done - self._bar.n)


def _bar() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True shows a bar of tqdm, which is not installed: pip install 'lazyckpt[cli]'") from error
    return tqdm(desc="read", unit="B", unit_scale=True, leave=False)
