"""What the ranks of a job do again and again that put a coordinator through its paces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dist.exchange import exchange
from support import patience

from ckpt.coordinator import Coordinator
from ckpt.errors import ClosedError, PeerError

TIMEOUT_S = patience(20.0)  # for what takes milliseconds
SHORT_S = 0.5  # for what must fail
PROMPT_S = patience(0.5)  # for what must end at once
SLACK_S = patience(1.3)  # by how much a deadline may be missed on a machine that is busy with other tests


def payload_of(rank: int, key: str) -> bytes:
    return f"{key} of rank {rank} ".encode() * 8


def meet(c: Coordinator, key: str) -> None:
    """One exchange that must succeed."""
    assert exchange(c, key, payload_of(c.rank, key), TIMEOUT_S) == [payload_of(rank, key) for rank in range(c.world_size)]


def expect_missing(ranks: tuple[int, ...], call: Callable[[], object], timeout_s: float = SHORT_S) -> PeerError:
    """The call must raise a PeerError that names these ranks, in time."""
    started = time.monotonic()
    try:
        call()
    except PeerError as error:
        elapsed = time.monotonic() - started
        assert error.ranks == ranks, error
        assert all(str(rank) in str(error) for rank in ranks)
        assert elapsed < timeout_s + SLACK_S, f"{elapsed:.2f} s instead of {timeout_s} s"
        return error
    raise AssertionError(f"nobody missed ranks {ranks}")


def expect_given_up(c: Coordinator, call: Callable[[], object], after_s: float = 0.0) -> None:
    """The call must end with ClosedError as soon as this rank is interrupted: after so many seconds, if it is not yet."""
    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()  # before: the wait may end while the first call is still at it
        c.interrupt()
        c.interrupt()

    timer = threading.Timer(after_s, interrupt)
    started = time.monotonic()
    timer.start()
    try:
        call()
    except ClosedError as error:
        elapsed = time.monotonic() - started
        assert "was given up: this process is closing its checkpoints" in str(error)
        assert elapsed < after_s + PROMPT_S, f"{elapsed:.2f} s instead of {after_s} s"
        assert after_s == 0 or interrupted.is_set()
        return
    finally:
        timer.join()
    raise AssertionError("it was not given up")
