"""What a drain serves to other nodes, and to nobody else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_roots import DEADLINE_S, RUN, Drain, Job, this_process, wait_for

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry
from ckpt.drain import addresses, serving
from ckpt.drain import node as nodes
from ckpt.drain.addresses import ServerAddress
from ckpt.drain.serving import Server
from ckpt.restore.fetching import Commit, NodeFetch
from ckpt.storage import scratch
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.scratch import NewFile

LOCAL = {"address": "127.0.0.1"}
MiB = 1 << 20

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(tmp_path, nodes=3, **LOCAL)
    made.save(1, common=2_000_000)
    return made


@pytest.fixture
def start(job: Job) -> Iterator[Callable[[int], ServerAddress]]:
    servers = []

    def start(node: int) -> ServerAddress:
        described = nodes.read(job.roots[node])
        server = Server(job.roots[node], described)
        servers.append(server)
        server.announce(described)
        found = addresses.read(addresses.path_of(job.home, RUN, node))
        assert found is not None and found.node == node
        return found

    yield start
    for server in servers:
        server.close()


def request(job: Job, address: ServerAddress, **changes: Any) -> bytes:
    manifest = job.saved[1].manifest
    said = {"run": RUN, "token": address.token, "sequence": 1, "identity": manifests.identity(manifest)}
    said |= {"name": "replicated.pt", "offset": 0, "length": None}
    return json.dumps(said | changes).encode() + b"\n"


def connect(address: ServerAddress) -> socket.socket:
    return socket.create_connection((address.host, address.port), DEADLINE_S)


def talk(address: ServerAddress, *requests: bytes) -> bytes:
    """All that comes until the server ends the connection, or this side has nothing more to ask."""
    with connect(address) as connection:
        for each in requests:
            connection.sendall(each)
        with contextlib.suppress(OSError):  # the server may have ended the connection already
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while more := connection.recv(1 << 16):
            received += more
        return received


def test_it_gives_files_ranges_and_the_manifest(job: Job, start: Callable[[int], ServerAddress]) -> None:
    address, content = start(0), job.saved[1].content["replicated.pt"]
    asked = [request(job, address), request(job, address, offset=5, length=7), request(job, address, name="manifest.json")]
    manifest = (job.roots[0] / "step-000000000001" / "manifest.json").read_bytes()
    expected = b'{"bytes": 2000000}\n' + content + b'{"bytes": 7}\n' + content[5:12]
    assert talk(address, *asked) == expected + b'{"bytes": %d}\n' % len(manifest) + manifest


def test_only_its_user_can_read_what_opens_the_door(job: Job, start: Callable[[int], ServerAddress]) -> None:
    start(0)
    path = addresses.path_of(job.home, RUN, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


REFUSED = b'{"error": "refused"}\n'
BAD = b'{"error": "bad request"}\n'
ABSENT = b'{"error": "absent"}\n'
UNKNOWN = b'{"error": "unknown checkpoint"}\n'


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({"token": "0" * 64}, REFUSED),
        ({"token": ""}, REFUSED),
        ({"token": None}, REFUSED),
        ({"token": "\udc80"}, REFUSED),
        ({"run": "another"}, REFUSED),
        ({"name": "../../node.json"}, ABSENT),
        ({"name": "../step-000000000001/replicated.pt"}, ABSENT),
        ({"name": "/etc/passwd"}, ABSENT),
        ({"name": "receipt-00000.json"}, ABSENT),
        ({"name": "secret"}, ABSENT),
        ({"name": "link"}, ABSENT),
        ({"name": ["replicated.pt"]}, ABSENT),
        ({"sequence": 2}, UNKNOWN),
        ({"identity": "0" * 16}, UNKNOWN),
        ({"sequence": True}, BAD),
        ({"sequence": "1"}, BAD),
        ({"offset": -1}, BAD),
        ({"offset": 2_000_001}, BAD),
        ({"length": 2_000_001}, BAD),
        ({"offset": 1, "length": 2_000_000}, BAD),
        ({"offset": 10**400}, BAD),
        ({"length": 1.5}, BAD),
    ],
    ids=str,
)
def test_it_refuses_what_it_should_not_give(
    job: Job, start: Callable[[int], ServerAddress], changes: dict[str, Any], answer: bytes
) -> None:
    address, folder = start(0), job.roots[0] / "step-000000000001"
    (folder / "secret").write_text("secret")
    (folder / "link").symlink_to("secret")
    assert talk(address, request(job, address, **changes)) == answer
    assert talk(address, request(job, address, length=1))[:13] == b'{"bytes": 1}\n', "others are not harmed"


@pytest.mark.parametrize(
    "nonsense", [b"\n", b"{}\n", b"[]\n", b"[" * 3000 + b"\n", b"\xff\n", b"x" * 5000, b"GET / HTTP/1.1\r\n"]
)
def test_nonsense_ends_the_connection(job: Job, start: Callable[[int], ServerAddress], nonsense: bytes) -> None:
    address = start(0)
    try:
        assert talk(address, nonsense) in (BAD, b"")
    except OSError:  # it was reset, with what the server has not read
        assert len(nonsense) > serving.LARGEST_LINE
    assert talk(address, request(job, address, length=1))[:13] == b'{"bytes": 1}\n'


@pytest.mark.parametrize("replaced", ["link", "pipe", "shorter", "gone"])
def test_it_gives_only_what_is_a_file_of_its_size(job: Job, start: Callable[[int], ServerAddress], replaced: str) -> None:
    address, path = start(0), job.roots[0] / "step-000000000001" / "replicated.pt"
    other = path.with_name("other")
    path.rename(other)
    if replaced == "link":
        path.symlink_to(other)
    elif replaced == "pipe":
        os.mkfifo(path)
    elif replaced == "shorter":
        path.write_bytes(other.read_bytes()[:-1])
    assert talk(address, request(job, address)) == ABSENT


def test_the_silent_lose_their_connection(
    job: Job, start: Callable[[int], ServerAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that send a byte now and then, and those that take nothing of what they have asked for."""
    monkeypatch.setattr(serving, "_REQUEST_S", 0.3)
    monkeypatch.setattr(serving, "_STALL_S", 0.3)
    address = start(0)
    with connect(address) as silent, connect(address) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(request(job, address) * 8)
        end, lost = time.monotonic() + DEADLINE_S, False
        while not lost and time.monotonic() < end:
            try:
                silent.sendall(b" ")
                time.sleep(0.05)
            except OSError as error:
                lost = error.errno in (errno.EPIPE, errno.ECONNRESET)
        assert lost
        wait_for(lambda: not any(thread.name == "ckpt-serve-connection" for thread in threading.enumerate()))


def test_it_has_so_many_connections_and_no_more(
    job: Job, start: Callable[[int], ServerAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_MOST_CONNECTIONS", 2)
    address = start(0)
    with connect(address) as first, connect(address):
        wait_for(lambda: sum(thread.name == "ckpt-serve-connection" for thread in threading.enumerate()) == 2)
        assert talk(address) == b'{"error": "busy"}\n'
        first.sendall(request(job, address, length=1))
        assert first.recv(13) == b'{"bytes": 1}\n'

    def is_served() -> bool:
        with contextlib.suppress(ConnectionResetError):  # still busy: it hangs up on what it has not read
            return talk(address, request(job, address, length=1))[:13] == b'{"bytes": 1}\n'
        return False

    wait_for(is_served)


def test_an_end_ends_what_is_being_sent(job: Job, tmp_path: Path) -> None:
    described = nodes.read(job.roots[0])
    server = Server(job.roots[0], described)
    server.announce(described)
    path = addresses.path_of(job.home, RUN, 0)
    address = addresses.read(path)
    assert address is not None
    with connect(address) as connection:
        connection.sendall(request(job, address) * 20)
        server.close()
        wait_for(lambda: not any(thread.name.startswith("ckpt-serve") for thread in threading.enumerate()))
    assert not path.exists()


# ---- fetching --------------------------------------------------------------------------------------------------------


def fetch_of(job: Job, base: Path, *holders: int, began: float = -1e9) -> NodeFetch:
    """Of a rank 0 on a node that has nothing; no drain is just being started."""
    commit = Commit(1, manifests.identity(job.saved[1].manifest), holders)
    return NodeFetch(job.home, base / "node9" / RUN, commit, 0, None, began, DEADLINE_S)


def entry_of(job: Job, name: str) -> FileEntry:
    return next(file for file in job.saved[1].manifest.files if file.name == name)


def test_a_file_comes_whole_and_in_parts(job: Job, start: Callable[[int], ServerAddress], tmp_path: Path) -> None:
    for node in range(3):
        start(node)
    fetch = fetch_of(job, tmp_path, 0, 1, 2)
    assert fetch.manifest() == manifests.read(job.roots[0] / "step-000000000001")
    path, source = fetch.whole(entry_of(job, "rank-00001.pt")) or (Path(), "")
    assert source == "node 1" and path.read_bytes() == job.saved[1].content["rank-00001.pt"]
    path, _ = fetch.ranges(entry_of(job, "replicated.pt"), [(10, 20), (1_000_000, 1_500_000)]) or (Path(), "")
    content, there = job.saved[1].content["replicated.pt"], path.read_bytes()
    assert there[10:20] == content[10:20] and there[1_000_000:1_500_000] == content[1_000_000:1_500_000]
    assert len(there) == len(content) and not any(there[:10]) and not any(there[20:1_000_000])
    fetch.close()
    assert not fetch.directory.exists()


def test_what_fails_comes_from_the_next(job: Job, start: Callable[[int], ServerAddress], tmp_path: Path) -> None:
    """One is damaged, one is gone; and one has never been there."""
    for node in range(3):
        start(node)
    damaged = job.roots[0] / "step-000000000001" / "replicated.pt"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    (job.roots[1] / "step-000000000001" / "replicated.pt").unlink()
    path, source = fetch_of(job, tmp_path, 0, 1, 2, 7).whole(entry_of(job, "replicated.pt")) or (Path(), "")
    assert source == "node 2" and path.read_bytes() == job.saved[1].content["replicated.pt"]
    damaged = job.roots[2] / "step-000000000001" / "replicated.pt"
    damaged.write_bytes(content)
    fetch = fetch_of(job, tmp_path / "other", 0, 1, 2)
    assert fetch.whole(entry_of(job, "replicated.pt")) is None, "no wrong byte is given"
    assert [path.name for path in fetch.directory.iterdir()] == [".replicated.pt.lock"]


def test_a_server_is_killed_in_the_midst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file comes from the next one; what had come of it is not used."""
    job = Job(tmp_path, nodes=2, pids=this_process(), rate=1, **LOCAL)
    job.save(1, common=64 * MiB)
    write, killed = NewFile.write, []
    with Drain(job.roots[0], []) as first, Drain(job.roots[1], []) as second:
        wait_for(lambda: len(addresses.read_all(job.home, RUN)) == 2)

        def kill_first(file: NewFile, block: memoryview) -> None:
            if not killed:
                first.signal(signal.SIGKILL)
                wait_for(lambda: not first.runs)
                killed.append(True)
            write(file, block)

        monkeypatch.setattr(NewFile, "write", kill_first)
        path, source = fetch_of(job, tmp_path, 0, 1).whole(entry_of(job, "replicated.pt")) or (Path(), "")
        assert killed and source == "node 1" and second.runs
        assert zlib.crc32(path.read_bytes()) == entry_of(job, "replicated.pt").crc32


def test_a_drain_that_is_just_started_is_waited_for(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2, pids=this_process(), **LOCAL)
    job.save(1)
    stale = ServerAddress("127.0.0.1", 1, "0" * 64, 0, frozenset({0}))
    addresses.announce(job.home, RUN, stale)  # of one that was killed
    fetch, found = fetch_of(job, tmp_path, 0, began=time.monotonic() + 1e6), []
    thread = threading.Thread(target=lambda: found.append(fetch.whole(entry_of(job, "rank-00000.pt"))))
    thread.start()
    with Drain(job.roots[0], []):
        thread.join(DEADLINE_S)
    assert found and found[0] is not None and found[0][1] == "node 0"


def test_a_disk_that_is_full_gives_nothing(
    job: Job, start: Callable[[int], ServerAddress], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(0)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fetch = fetch_of(job, tmp_path, 0)
    monkeypatch.setattr(scratch.os, "write", full)
    assert fetch.whole(entry_of(job, "replicated.pt")) is None
    monkeypatch.undo()
    assert [path.name for path in fetch.directory.iterdir()] == [".replicated.pt.lock"]


def test_nothing_is_removed_while_somebody_restores(tmp_path: Path) -> None:
    job = Job(tmp_path, keep=1)
    lock = DirectoryLock(job.roots[0], name=nodes.RESTORING)
    lock.acquire()
    with Drain(job.roots[0], []) as drain:
        for step in (1, 2):
            job.save(step)
            wait_for(lambda step=step: job.state(step) == "committed", drain)
        assert job.steps_on() == [1, 2] and drain.runs, "nobody trains, but somebody restores"
        lock.release()
        wait_for(lambda: not drain.runs)
    assert job.steps_on() == [2]
