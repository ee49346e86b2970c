"""How much of a file has been read so far: a thread looks at what the core has counted, which costs the readers nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_LOOK_S = 0.1


@contextlib.contextmanager
def watched(counter: Callable[[], int], tell: Callable[[int], object]) -> Iterator[None]:
    """
    Args:
        counter: says how many bytes have been read, from whatever number on.
        tell: is called meanwhile, every now and then and by another thread, with how many more those are than at first.
    """
    ended = threading.Event()

    def look() -> None:
        before = counter()
        while not ended.wait(_LOOK_S):
            tell(counter() - before)

    thread = threading.Thread(target=look, name="ckpt-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
