"""Connections to a store of torch.distributed, apart from those that training uses.

A client of a TCPStore is locked while one of its calls waits: training's own client would be held up, so we connect anew. And
when a wait is over, the client waits without any deadline for the server to confirm that; a server that is stopped would keep
it for ever. So each connection has a thread that makes the calls, and a caller that abandons both when a call does not return.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from ckpt.coordinator._base import Deadline

PREFIX = "lazyckpt/"
_GRACE_S = 0.5  # after its deadline, for a call to come back before it is abandoned
_CONNECTING_S = 60.0

_T = TypeVar("_T")
Work = Callable[[Any], _T]  # gets the client


class Hung(Exception):
    """A call of the store did not come back by its deadline."""


class Lost(Exception):
    """A call of the store failed: mostly because there is no server any more, or because its own timeout is over."""


class Lines:
    """As many connections as there are threads that wait at the same time: mostly one."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[_Line] = []  # guarded by _lock
        self._closed = False  # guarded by _lock

    def call(self, work: Work[_T], deadline: Deadline) -> _T:
        """Makes calls on a client.

        Raises:
            Hung: they did not return by the deadline, and a little later.
            Lost: they failed.
        """
        with self._lock:
            line = self._idle.pop() if self._idle else _Line(self._connect)
        try:
            return line.call(work, deadline.left_s + _GRACE_S)
        finally:
            self._give_back(line)

    def close(self) -> None:
        """Ends the threads that are idle now, and every other one when its call returns."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for line in idle:
            line.end(wait=True)

    def _give_back(self, line: _Line) -> None:
        with self._lock:
            kept = not line.busy and not self._closed
            if kept:
                self._idle.append(line)
        if not kept:
            line.end(wait=False)


class _Line:
    """One connection and its thread; used by one caller at a time."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.busy = False  # in a call, perhaps one that nobody waits for any more
        self._orders: queue.SimpleQueue[tuple[Work[Any], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._orders, connect), name="ckpt-store", daemon=True)
        self._thread.start()

    def call(self, work: Work[_T], timeout_s: float) -> _T:
        reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.busy = True
        self._orders.put((work, reply))
        try:
            result, error = reply.get(timeout=timeout_s)
        except queue.Empty:
            raise Hung(f"the store did not answer within {timeout_s:.1f} s") from None
        self.busy = False
        if isinstance(error, RuntimeError):  # all errors of torch's stores are
            raise Lost(f"the store failed: {_first_line(error)}") from error
        if error is not None:
            raise error
        answer: _T = result
        return answer

    def end(self, wait: bool) -> None:
        self._orders.put(None)
        if wait:
            self._thread.join(_GRACE_S)


def _serve(orders: queue.SimpleQueue[tuple[Work[Any], Any] | None], connect: Callable[[], Any]) -> None:
    """The thread of a line. It connects when the first call comes, and again when connecting failed."""
    client = None
    while (order := orders.get()) is not None:
        work, reply = order
        try:
            if client is None:
                client = connect()
            reply.put((work(client), None))
        except BaseException as error:
            reply.put((None, error.with_traceback(None)))
        del order, work, reply  # else the last payload would live until the next call


def connector(store: Any) -> Callable[[], Any]:
    """What opens a new client to the server of `store`, with our prefix on its keys."""
    from torch.distributed import FileStore, PrefixStore, TCPStore

    def connect() -> Any:
        if hasattr(store, "clone"):
            return PrefixStore(PREFIX, store.clone())
        base = store
        while isinstance(base, PrefixStore):
            base = base.underlying_store
        if isinstance(base, TCPStore):  # older torch: the prefixes of `store` are lost, which does no harm
            timeout = timedelta(seconds=_CONNECTING_S)
            return PrefixStore(PREFIX, TCPStore(base.host, base.port, timeout=timeout, wait_for_workers=False))
        path = getattr(base, "path", None)
        if isinstance(base, FileStore) and path is not None:
            return PrefixStore(PREFIX, FileStore(path))
        return PrefixStore(PREFIX, base)  # a HashStore waits without holding its lock

    return connect


def as_timedelta(seconds: float) -> timedelta:
    """At least a millisecond: the stores take 0 for no timeout at all."""
    return timedelta(milliseconds=max(1, round(seconds * 1000)))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
