"""Connections to a store of torch.distributed, apart from those that training uses.

A client of a TCPStore is locked while one of its calls waits: training's own client would be held up, so we connect anew. And
when a wait is over, the client waits without any deadline for the server to confirm that; a server that is stopped would keep
it for ever. So each connection has a thread that makes the calls, and a caller that abandons both when a call does not return.

A thread that is abandoned must not come back while the interpreter ends: it would end the process with an abort. So its
connection is shut down under it, which ends the call at once.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import stat
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from ckpt.coordinator.waiting import GRACE_S, Deadline

PREFIX = "lazyckpt/"
_CONNECTING_S = 60.0
_ENDING_S = 0.2  # for a thread to end whose connection is shut down
_DESCRIPTOR = re.compile(r"client=.*?\bfd=(\d+)")

_T = TypeVar("_T")
Work = Callable[[Any], _T]  # gets the client
_Reply = tuple[Any, "BaseException | None"]  # what the work returned, or raised


class Hung(Exception):
    """A call of the store did not come back by its deadline."""


class Lost(Exception):
    """A call of the store failed: mostly because there is no server any more, or because its own timeout is over.

    Also raised where no thread can be started for a further connection.
    """


class StoreConnections:
    """As many connections as there are threads that wait at the same time: mostly one."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[StoreConnection] = []  # guarded by _lock, as the next three
        self._in_use: set[StoreConnection] = set()
        self._last: Deadline | None = None
        self._closed = False

    def call(self, work: Work[_T], deadline: Deadline) -> _T:
        """Makes calls on a client.

        Raises:
            Hung: they did not return by the deadline, and a little later.
            Lost: they failed.
            ClosedError: the wait was given up.
        """
        with self._lock:
            connection = self._idle.pop() if self._idle else StoreConnection(self._connect)
            self._in_use.add(connection)
            last = self._last
        try:
            return connection.call(work, deadline, last)
        finally:
            self._give_back(connection)

    def wake(self) -> None:
        """Lets every call in progress look at its deadline again."""
        with self._lock:
            for connection in self._in_use:
                connection.wake()

    def end_by(self, deadline: Deadline) -> None:
        """No call that begins from now on takes longer, whatever its own deadline, and without the grace."""
        with self._lock:
            self._last = self._last or deadline

    def close(self) -> None:
        """Ends the threads that are idle now, and every other one when its call returns."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.end(GRACE_S)

    def _give_back(self, connection: StoreConnection) -> None:
        with self._lock:
            self._in_use.discard(connection)
            kept = not connection.busy and not self._closed
            if kept:
                self._idle.append(connection)
        if not kept:
            connection.hang_up()
            connection.end(_ENDING_S)


class StoreConnection:
    """One connection and its thread; used by one caller at a time."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.busy = False  # in a call, perhaps one that nobody waits for any more
        self._orders: queue.SimpleQueue[Work[Any] | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[_Reply | None] = queue.SimpleQueue()  # None: from wake()
        self._socket = _Socket()
        ends = (self._orders, self._replies, self._socket, connect)
        self._thread = threading.Thread(target=_serve, args=ends, name="ckpt-store", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the interpreter is shutting down, or there are too many threads
            raise Lost(f"no connection to the store: {error}") from error

    def call(self, work: Work[_T], deadline: Deadline, last: Deadline | None) -> _T:
        deadline.check()
        self.busy = True
        self._orders.put(work)
        result, error = self._reply(deadline, last)
        self.busy = False
        if isinstance(error, RuntimeError):  # all errors of torch's stores are
            raise Lost(f"the store failed: {_first_line(error)}") from error
        if error is not None:
            raise error
        answer: _T = result
        return answer

    def _reply(self, deadline: Deadline, last: Deadline | None) -> _Reply:
        began = time.monotonic()
        while True:
            deadline.check()
            left_s = deadline.left_s + GRACE_S
            try:
                reply = self._replies.get(timeout=left_s if last is None else min(left_s, last.left_s))
            except queue.Empty:
                raise Hung(f"the store did not answer within {time.monotonic() - began:.1f} s") from None
            if reply is not None:
                return reply

    def wake(self) -> None:
        self._replies.put(None)

    def hang_up(self) -> None:
        """Ends the call that nobody waits for any more, if there is one."""
        if self.busy:
            self._socket.shut_down()

    def end(self, wait_s: float) -> None:
        self._orders.put(None)
        self._thread.join(wait_s)


class _Socket:
    """That of a client, which owns it; found in what a TCPStore shows of itself. Does nothing where it is not known."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._inode = 0

    def find(self, client: Any) -> None:
        while hasattr(client, "underlying_store"):
            client = client.underlying_store
        shown = _DESCRIPTOR.search(repr(client))
        if shown is not None:
            self._inode, self._descriptor = _inode_of(int(shown[1])), int(shown[1])

    def shut_down(self) -> None:
        if self._inode == 0:
            return
        with contextlib.suppress(OSError):
            own = os.dup(self._descriptor)
            if _inode_of(own) != self._inode:  # the client has closed it, and the number is another's
                os.close(own)
                return
            with socket.socket(fileno=own) as held:
                held.shutdown(socket.SHUT_RDWR)


def _inode_of(descriptor: int) -> int:
    """0 if it is no socket."""
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        return status.st_ino if stat.S_ISSOCK(status.st_mode) else 0
    return 0


def _serve(
    orders: queue.SimpleQueue[Work[Any] | None],
    replies: queue.SimpleQueue[_Reply | None],
    own: _Socket,
    connect: Callable[[], Any],
) -> None:
    """The thread of a connection. It connects when the first call comes, and again when connecting failed."""
    client = None
    while (work := orders.get()) is not None:
        try:
            if client is None:
                client = connect()
                own.find(client)
            replies.put((work(client), None))
        except BaseException as error:
            replies.put((None, error.with_traceback(None)))
        del work  # else the last payload would live until the next call


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
