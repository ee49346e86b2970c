"""Serves what is committed on a node to restores on other nodes. Read-only: a thread of the drain, and one for each connection.

    client   one line of JSON {"run", "token", "sequence", "identity", "name", "offset", "length"}
    server   {"bytes": n} and n bytes, or {"error": why}

`length` null: to the end. A client may ask again on the same connection. Names are those of a committed manifest, or its own;
nothing else is opened. Who does not know the token, or does not keep to this, loses the connection; nobody else feels it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.drain import addresses
from ckpt.drain.addresses import ServerAddress
from ckpt.drain.home import Home
from ckpt.drain.node import Generations, Node
from ckpt.errors import CheckpointError, StorageError
from ckpt.storage import scratch
from ckpt.storage.scratch import OpenFile

logger = logging.getLogger("ckpt")

LARGEST_LINE = 4096  # of a request, and of an answer
ABSENT, BUSY, REFUSED, BAD = "absent", "busy", "refused", "bad request"
UNKNOWN = "unknown checkpoint"  # which may become one: of a node that missed the verdict
_MOST_CONNECTIONS = 64
_REQUEST_S = 30.0  # from one request to the end of the next
_STALL_S = 30.0  # for a client that takes nothing
_SLOWEST = 1 << 20  # bytes a second: who takes less loses the connection, because others may wait for one
_BLOCK_BYTES = 8 << 20
_ACCEPT_S = 0.5
_TOKEN_BYTES = 32


class _Request(NamedTuple):
    sequence: int
    identity: str
    name: str
    offset: int
    length: int | None


class _RequestError(Exception):
    """What the client is told. `last`: before its connection ends."""

    def __init__(self, text: str, *, last: bool = True) -> None:
        super().__init__(text)
        self.last = last


class Server:
    """Of one node and run. It listens as soon as it is made.

    Args:
        root: of the run on the node.

    Raises:
        OSError: the address is none of this host's.
    """

    def __init__(self, root: Path, node: Node) -> None:
        self._run = node.run
        self._generations = Generations(root)
        self._looking = threading.Lock()
        self._connections: set[socket.socket] = set()  # guarded by _changing
        self._changing = threading.Lock()
        self._closed = False
        self._announced: tuple[Path, ServerAddress] | None = None
        self._token = secrets.token_hex(_TOKEN_BYTES)
        self.address = node.address  # as the job has chosen it
        self._listener = _listen(node.address)
        self._listener.settimeout(_ACCEPT_S)
        self._thread = threading.Thread(target=self._accept, name="ckpt-serve", daemon=True)
        self._thread.start()

    def announce(self, node: Node) -> None:
        """Tells at home where it listens, once for all, unless the job has numbered its nodes anew.

        Raises:
            StorageError: home cannot be written to.
            CheckpointError: it is the home of another run.
        """
        host = self.address or socket.gethostname()
        port, ranks = self._listener.getsockname()[1], frozenset(node.place.ranks)
        said = node.home, ServerAddress(host, port, self._token, node.place.number, ranks)
        if said != self._announced:
            self._withdraw()
            Home(node).expect_ours()
            addresses.announce(node.home, node.run, said[1])
            self._announced = said

    def _withdraw(self) -> None:
        announced, self._announced = self._announced, None
        if announced is not None:
            addresses.withdraw(announced[0], self._run, announced[1])

    def close(self) -> None:
        """Ends what is being sent, too."""
        self._withdraw()
        with self._changing:
            self._closed = True
            open_now = list(self._connections)
        self._listener.close()
        for connection in open_now:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # ---- connections -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._closed:
                    logger.debug("a connection could not be taken: %s", error)
                    time.sleep(_ACCEPT_S)
                continue
            connection.setblocking(False)
            if not self._admit(connection):
                with connection, contextlib.suppress(OSError):
                    connection.send(_line({"error": BUSY}))

    def _admit(self, connection: socket.socket) -> bool:
        with self._changing:
            if self._closed or len(self._connections) >= _MOST_CONNECTIONS:
                return False
            self._connections.add(connection)
        try:
            name = "ckpt-serve-connection"
            threading.Thread(target=self._converse, args=(connection,), name=name, daemon=True).start()
        except RuntimeError:  # there can be no more threads
            self._forget(connection)
            return False
        return True

    def _forget(self, connection: socket.socket) -> None:
        with self._changing:
            self._connections.discard(connection)

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection:
                said = b""
                while not self._closed:
                    line, said = _read_line(connection, said)
                    if not line:
                        return
                    try:
                        self._answer(connection, self._parse(line))
                    except _RequestError as error:
                        _send(connection, _line({"error": str(error)}))
                        if error.last:
                            return
        except (OSError, CheckpointError) as error:
            logger.debug("a connection has ended: %s", error)
        except Exception:
            logger.exception("answering another node failed")
        finally:
            self._forget(connection)

    def _parse(self, line: bytes) -> _Request:
        try:
            said = json.loads(line)
            run, token = str(said["run"]), str(said["token"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _RequestError(BAD) from None
        # Both are compared, in a time that tells nothing of where they differ.
        if not (_same(run, self._run) & _same(token, self._token)):
            raise _RequestError(REFUSED)
        try:
            length = said["length"]
            request = _Request(
                _count(said["sequence"]),
                str(said["identity"]),
                str(said["name"]),
                _count(said["offset"]),
                None if length is None else _count(length),
            )
        except (ValueError, KeyError, TypeError):
            raise _RequestError(BAD) from None
        return request

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, connection: socket.socket, request: _Request) -> None:
        with self._looking:
            try:
                found = self._generations.find()
            except StorageError:
                found = []
        of_sequence = (each for each in found if each.sequence == request.sequence)
        generation = next((each for each in of_sequence if manifests.identity(each.manifest) == request.identity), None)
        if generation is None:
            raise _RequestError(UNKNOWN, last=False)
        if request.name == manifests.NAME:
            begin, end = _bounds(request, len(generation.content))
            _send(connection, _line({"bytes": end - begin}) + generation.content[begin:end])
            return
        entry = next((file for file in generation.manifest.files if file.name == request.name), None)
        if entry is None:
            raise _RequestError(ABSENT, last=False)
        begin, end = _bounds(request, entry.bytes)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(scratch.opened(generation.directory / entry.name, entry.bytes))
            except StorageError:
                raise _RequestError(ABSENT, last=False) from None
            _send(connection, _line({"bytes": end - begin}))
            _send_file(connection, file, begin, end)


def _bounds(request: _Request, size: int) -> tuple[int, int]:
    end = size if request.length is None else request.offset + request.length
    if request.offset > size or end > size:
        raise _RequestError(BAD)
    return request.offset, end


def _listen(address: str | None) -> socket.socket:
    if address is not None:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(where[:2], family=family)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _same(said: str, expected: str) -> bool:
    return hmac.compare_digest(said.encode(errors="surrogatepass"), expected.encode(errors="surrogatepass"))


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError
    return value


def _line(said: dict[str, Any]) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _read_line(connection: socket.socket, said: bytes) -> tuple[bytes, bytes]:
    """A request, and what has come behind it. Empty: the client has gone."""
    end = time.monotonic() + _REQUEST_S
    while b"\n" not in said:
        if len(said) >= LARGEST_LINE:
            _send(connection, _line({"error": BAD}))
            return b"", b""
        _wait(connection, select.POLLIN, end)
        more = connection.recv(LARGEST_LINE - len(said))
        if not more:
            return b"", b""
        said += more
    line, _, rest = said.partition(b"\n")
    return line, rest


def _send(connection: socket.socket, content: bytes) -> None:
    end, left = time.monotonic() + _STALL_S + len(content) / _SLOWEST, memoryview(content)
    while left:
        _wait(connection, select.POLLOUT, end)
        left = left[connection.send(left[:_BLOCK_BYTES]) :]


def _send_file(connection: socket.socket, file: OpenFile, begin: int, end: int) -> None:
    until = time.monotonic() + _STALL_S + (end - begin) / _SLOWEST
    while begin < end:
        _wait(connection, select.POLLOUT, until)
        sent = file.send(connection, begin, min(end - begin, _BLOCK_BYTES))
        if sent == 0:
            raise OSError("the file has become shorter")
        begin += sent


def _wait(connection: socket.socket, event: int, end: float) -> None:
    """
    Raises:
        TimeoutError: it does not come in time.
    """
    poll = select.poll()
    poll.register(connection, event)
    left = min(end - time.monotonic(), _STALL_S)
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError("the other side is silent")
