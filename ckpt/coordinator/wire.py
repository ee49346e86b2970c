"""Messages between the processes of one node, over sockets that have a name but no file: the name goes with its process.

A message is one byte, its kind, then a header, a key and a payload; but for PULSE, which is that byte alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from ckpt.coordinator.launchers import local_ranks, node_number

HELLO, READY = b"h", b"r"  # who has connected, and that it is counted on from now on
POST, HEAR = b"a", b"w"  # requests: pass my answer on, tell me the word of rank 0
DONE, LOST, UNSURE = b"d", b"l", b"u"  # replies: it is done; it is certain not to be; it may be, or not
PULSE = b"p"  # the request is still being worked on

_HEADER = struct.Struct("<HdQ")  # length of the key, seconds, length of the payload
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
_BACKLOG = 1024


class Message(NamedTuple):
    """
    Attributes:
        seconds: that a request may take.
    """

    kind: bytes
    key: str = ""
    payload: bytes = b""
    seconds: float = 0.0


class Parted(Exception):
    """The other side is gone, or has closed the connection; or this one has."""


class Silent(Exception):
    """The other side neither sends nor takes anything, for as long as it was given."""


class Wire:
    """One connection. Several threads may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self.working = False  # on a request of the other side
        _sockets.add(connection)

    def send(self, message: Message, patience_s: float | None = None) -> None:
        """
        Raises:
            Parted, Silent: it has not been sent as a whole.
        """
        key = message.key.encode()
        head = message.kind + _HEADER.pack(len(key), message.seconds, len(message.payload)) + key
        with self._sending:
            for content in (head, message.payload):
                self._write(content, patience_s)

    def pulse(self) -> None:
        """Unless something is being sent, which tells as much. Does not wait."""
        if self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    self._socket.send(PULSE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            finally:
                self._sending.release()

    def receive(self, patience_s: float | None = None) -> Message:
        """
        Raises:
            Parted, Silent: nothing more will come, or came.
        """
        kind = self._read(1, patience_s)
        if kind == PULSE:
            return Message(kind)
        length, seconds, nbytes = _HEADER.unpack(self._read(_HEADER.size, patience_s))
        key = self._read(length, patience_s).decode()
        return Message(kind, key, self._read(nbytes, patience_s), seconds)

    def stop_receiving(self) -> None:
        """What waits for a message gets Parted; what is being sent goes out."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """Ends every call on it; from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """No other thread may use it any more."""
        self._socket.close()

    def _write(self, content: bytes, patience_s: float | None) -> None:
        view = memoryview(content)
        try:
            self._socket.settimeout(patience_s)
            while view:
                view = view[self._socket.send(view, socket.MSG_NOSIGNAL) :]
        except TimeoutError:
            raise Silent from None
        except OSError as error:
            raise Parted from error

    def _read(self, count: int, patience_s: float | None) -> bytes:
        content = bytearray(count)
        view = memoryview(content)
        try:
            self._socket.settimeout(patience_s)
            while view:
                received = self._socket.recv_into(view)
                if received == 0:
                    raise Parted
                view = view[received:]
        except TimeoutError:
            raise Silent from None
        except OSError as error:
            raise Parted from error
        return bytes(content)


# ---- names -----------------------------------------------------------------------------------------------------------


def address_of(session: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Of the node of this process, for the ranks of one session; None: they go without.

    Whoever reaches it is on the same node. So containers that have networks of their own are nodes of their own, and what a
    launcher calls nodes may be on one machine.
    """
    if sys.platform != "linux" or local_ranks(environment) == 1:
        return None
    number = node_number(environment)
    return f"\0lazyckpt-{session}-{'' if number is None else number}"


def listen_at(address: str) -> socket.socket | None:
    """None: another process does, or it cannot be done here."""
    listener = _new_socket()
    if listener is None:
        return None
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        return None
    _sockets.add(listener)
    return listener


def connect_to(address: str, patience_s: float) -> Wire | None:
    """None: nobody listens there, or not a process of the same user, or it cannot be done here.

    Raises:
        Silent: who listens does not take it.
    """
    connection = _new_socket()
    if connection is None:
        return None
    try:
        connection.settimeout(patience_s)
        connection.connect(address)
        if is_of_same_user(connection):
            return Wire(connection)
    except (BlockingIOError, TimeoutError):
        connection.close()
        raise Silent from None
    except OSError:
        pass
    connection.close()
    return None


def _new_socket() -> socket.socket | None:
    """None: there are no such sockets in this sandbox, or no more descriptors just now."""
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return None


def is_of_same_user(connection: socket.socket) -> bool:
    """Such names have no permissions: any process of the machine may use them."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())


# ---- forks -----------------------------------------------------------------------------------------------------------

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """Else a DataLoader's worker would keep a connection open whose process has died, and nobody would notice."""
    for connection in list(_sockets):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)
