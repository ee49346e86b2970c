"""Fetches from other nodes what this one lacks of a commit: their drains serve it, see ckpt/drain/serving.py.

    <disk of the node>/<run>/fetched-<sequence>-<identity>/    as long as the restore goes on
        rank-00003.pt                 whole, and compared with its manifest: all ranks of the node read it
        __3_0.distcp.of-00001         what rank 1 needs of a file; the rest are holes. Who reads it verifies each piece

Nothing there is a checkpoint to anybody: it has no manifest, and the name of no step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt import _native
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.drain import addresses
from ckpt.drain.addresses import ServerAddress
from ckpt.drain.serving import ABSENT, BUSY, LARGEST_LINE, REFUSED, UNKNOWN
from ckpt.errors import CorruptError, InUseError, StorageError
from ckpt.restore.lone_writer import lone_writer
from ckpt.storage import durable, scratch
from ckpt.storage.scratch import NewFile

logger = logging.getLogger("ckpt")

_PREFIX = "fetched-"
# Drains are started when the restore begins: it may take them so long to be there.
_START_S = 30.0
_CONNECT_S = 5.0
_STALL_S = 30.0
_LOOK_S = 0.1
_BLOCK_BYTES = 4 << 20
_LARGEST_MANIFEST = 1 << 26


class Commit(NamedTuple):
    """
    Attributes:
        identity: see manifests.identity().
        holders: numbers of the nodes of this job on which files of it lie.
    """

    sequence: int
    identity: str
    holders: tuple[int, ...] = ()


def directory_of(root: Path, commit: Commit) -> Path:
    """Where what is fetched of it lies."""
    return root / f"{_PREFIX}{commit.sequence:012d}-{commit.identity}"


class _AbsentError(Exception):
    """A node has not got it."""


class _AwayError(Exception):
    """A node does not answer, or not as it should.

    Attributes:
        starts: it may be that its drain has not come far enough yet, or the ranks there.
        busy: others are fetching from it.
    """

    def __init__(self, text: str, *, starts: bool = False, busy: bool = False) -> None:
        super().__init__(text)
        self.starts = starts
        self.busy = busy


class _Peer:
    """The drain of another node; connected when it is first asked."""

    def __init__(self, address: ServerAddress, run: str, commit: Commit) -> None:
        self.address = address
        self._run = run
        self._commit = commit
        self._connection: socket.socket | None = None

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def ask(self, name: str, offset: int, length: int | None, take: Callable[[memoryview], None], most: int, end: float) -> int:
        """Returns how many bytes came.

        Args:
            take: called with each block.
            most: no answer may be longer.
            end: until when all must have come, monotonic.

        Raises:
            _AbsentError, _AwayError: see there. Whatever take() raises.
        """
        request = {
            **{"run": self._run, "token": self.address.token, "sequence": self._commit.sequence},
            **{"identity": self._commit.identity, "name": name, "offset": offset, "length": length},
        }
        try:
            connection, size, begun = self._begin(json.dumps(request).encode() + b"\n")
            if size > most or (length is not None and size != length):
                raise _AwayError(f"it offers {size} bytes of '{name}'")
            self._receive(connection, size, begun, take, end)
            return size
        except _AbsentError:
            raise
        except StorageError:
            self.close()  # in the midst of an answer, which cannot be written here
            raise
        except OSError as error:
            self.close()
            raise _AwayError(str(error)) from error
        except BaseException:
            self.close()  # in the midst of an answer
            raise

    def _begin(self, request: bytes) -> tuple[socket.socket, int, bytes]:
        """The connection, how many bytes come on it, and those that have come already."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(request)
                said = self._connection.recv(LARGEST_LINE)
                if said:
                    return self._connection, *self._read_answer(self._connection, said)
            self.close()  # it was silent for too long; another one is made
        try:
            self._connection = socket.create_connection((self.address.host, self.address.port), _CONNECT_S)
        except OSError as error:
            raise _AwayError(f"{self.address.host}: {error}", starts=True) from error
        self._connection.settimeout(_STALL_S)
        self._connection.sendall(request)
        return self._connection, *self._read_answer(self._connection, b"")

    def _read_answer(self, connection: socket.socket, said: bytes) -> tuple[int, bytes]:
        while b"\n" not in said:
            more = connection.recv(LARGEST_LINE - len(said)) if len(said) < LARGEST_LINE else b""
            if not more:
                raise _AwayError("it ends the connection")
            said += more
        line, _, begun = said.partition(b"\n")
        try:
            answer = json.loads(line)
            if "error" in answer:
                if answer["error"] == ABSENT:
                    raise _AbsentError
                why = str(answer["error"])
                raise _AwayError(f"it says '{why}'", starts=why in (REFUSED, UNKNOWN), busy=why == BUSY)
            return int(answer["bytes"]), begun
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _AwayError(f"its answer cannot be understood: {error!r}") from error

    def _receive(
        self, connection: socket.socket, size: int, begun: bytes, take: Callable[[memoryview], None], end: float
    ) -> None:
        left = size - len(begun)
        if left < 0:
            raise _AwayError("it sends more than it says")
        if begun:
            take(memoryview(begun))
        block = memoryview(bytearray(min(_BLOCK_BYTES, left)))
        while left:
            filled = 0
            while filled < min(len(block), left):
                if time.monotonic() > end:
                    raise _AwayError("it is too slow")
                count = connection.recv_into(block[filled : min(len(block), left)])
                if count == 0:
                    raise _AwayError("it ends the connection")
                filled += count
            take(block[:filled])
            left -= filled


class NodeFetch:
    """Of one commit, on one rank.

    Args:
        home: where the addresses of the others lie.
        root: of the run on this node; it need not be there.
        node: the number of this node; None: it has none.
        began: when the drains were started, monotonic.
        timeout_s: longest that one file may take, seconds.

    Attributes:
        manifest_content: what manifest() has given, as it came.
    """

    def __init__(
        self, home: Path, root: Path, commit: Commit, rank: int, node: int | None, began: float, timeout_s: float
    ) -> None:
        self.directory = directory_of(root, commit)
        self._home = home
        self._run = root.name
        self._commit = commit
        self._rank = rank
        self._node = node
        self._started = began + _START_S
        self._timeout_s = timeout_s
        self._peers: dict[ServerAddress, _Peer] = {}
        self._dismissed: set[tuple[int, str]] = set()  # nodes that have not got a file, or not as it should be
        self._away: set[int] = set()  # nodes that are not there, and will not come
        self._used: dict[str, int] = {}  # the node that a file has come from
        self.manifest_content = b""
        self._damaged: set[str] = set()  # whole files that have changed since

    def close(self) -> None:
        """Removes what was fetched; every rank has read it."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        scratch.remove(self.directory)

    def manifest(self) -> Manifest | None:
        """None if no node gives it."""
        found: list[Manifest] = []

        def work(peer: _Peer, end: float) -> None:
            content = bytearray()
            peer.ask(manifests.NAME, 0, None, content.extend, _LARGEST_MANIFEST, end)
            try:
                manifest = manifests.parse(bytes(content))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise _AwayError(f"its manifest cannot be read: {error!r}") from error
            if manifest.sequence != self._commit.sequence or manifests.identity(manifest) != self._commit.identity:
                raise _AwayError("its manifest is of another checkpoint")
            found.append(manifest)
            self.manifest_content = bytes(content)

        self._from_any(manifests.NAME, None, work)
        return found[0] if found else None

    def whole(self, entry: FileEntry) -> tuple[Path, str] | None:
        """The file, and what it has come from; None if no node gives it. It is what its manifest says."""
        path = self.directory / entry.name
        if entry.name in self._damaged:
            return None
        try:
            with lone_writer(path, self._timeout_s):
                if os.path.lexists(path):
                    return path, self._label(entry.name)
                node = self._into(path, entry, lambda peer, file, end: self._copy(peer, file, entry, end))
                return None if node is None else (path, self._label(entry.name))
        except (StorageError, InUseError) as error:
            logger.warning("'%s' cannot be fetched: %s", path, error)
            return None

    def ranges(self, entry: FileEntry, wanted: Sequence[tuple[int, int]]) -> tuple[Path, str] | None:
        """The same, but only these bytes of it, (begin, end), ascending, are what the node has said.

        What is there already is fetched again: it may be damaged.
        """
        path = self.directory / f"{entry.name}.of-{self._rank:05d}"
        node = self._into(path, entry, lambda peer, file, end: self._copy_ranges(peer, file, entry, wanted, end))
        return None if node is None else (path, self._label(entry.name))

    def dismiss(self, entry: FileEntry, path: Path) -> None:
        """What was fetched to `path` is not what it should be: it is not given again, nor is its node asked for it."""
        if path.name == entry.name:
            self._damaged.add(entry.name)
        self._dismissed.add((self._used.get(entry.name, -1), entry.name))

    def _label(self, name: str) -> str:
        node = self._used.get(name)
        return "another node" if node is None else f"node {node}"  # the former: another rank has fetched it

    # ---- files -----------------------------------------------------------------------------------------------------

    def _into(self, path: Path, entry: FileEntry, copy: Callable[[_Peer, NewFile, float], None]) -> int | None:
        """Fetches to a temporary name, which becomes `path`. Returns the node."""

        def work(peer: _Peer, end: float) -> None:
            with scratch.new_file(path) as file:
                copy(peer, file, end)

        try:
            durable.make_directory(self.directory, durable=False)
            node = self._from_any(entry.name, entry, work)
        except StorageError as error:
            logger.warning("'%s' cannot be fetched from another node: %s", path, error)
            return None
        if node is not None:
            self._used[entry.name] = node
            logger.info("'%s' was fetched from node %d", path, node)
        return node

    def _copy(self, peer: _Peer, file: NewFile, entry: FileEntry, end: float) -> None:
        crc = 0

        def take(block: memoryview) -> None:
            nonlocal crc
            crc = _native.crc32(block, crc)
            file.write(block)

        size = peer.ask(entry.name, 0, None, take, entry.bytes, end)
        if (size, crc) != (entry.bytes, entry.crc32):
            raise CorruptError(f"'{entry.name}' of node {peer.address.node} is not what its manifest says")

    def _copy_ranges(self, peer: _Peer, file: NewFile, entry: FileEntry, wanted: Sequence[tuple[int, int]], end: float) -> None:
        file.grow(entry.bytes)
        for begin, until in wanted:
            file.seek(begin)
            peer.ask(entry.name, begin, until - begin, file.write, until - begin, end)

    # ---- who is asked ----------------------------------------------------------------------------------------------

    def _from_any(self, name: str, entry: FileEntry | None, work: Callable[[_Peer, float], None]) -> int | None:
        """The node that has done it; None: none can.

        Raises:
            StorageError: the disk of this node fails.
        """
        end = time.monotonic() + self._timeout_s
        while time.monotonic() < end:
            addresses_now = {address.node: address for address in self._addresses()}
            awaited = False
            for node in self._in_order({*addresses_now, *self._commit.holders}, entry, addresses_now):
                if (node, name) in self._dismissed or node in self._away:
                    continue
                failed = self._try(addresses_now.get(node), work, end)
                if failed is None:
                    return node
                mine = node in self._commit.holders
                if failed.busy or (failed.starts and mine and time.monotonic() < self._started):
                    awaited = True
                elif failed.starts:
                    self._away.add(node)
                    log = logger.warning if mine else logger.debug
                    log("nothing can be fetched from node %d: %s", node, failed)
                else:
                    self._dismissed.add((node, name))
                    log = logger.warning if str(failed) else logger.debug
                    log("'%s' was not fetched from node %d: %s", name, node, failed)
            if not awaited:
                return None
            time.sleep(_LOOK_S)
        return None

    def _try(self, address: ServerAddress | None, work: Callable[[_Peer, float], None], end: float) -> _AwayError | None:
        """Why it was not done; says nothing if the node has just not got it."""
        if address is None:
            return _AwayError("it does not say where", starts=True)
        peer = self._peers.setdefault(address, _Peer(address, self._run, self._commit))
        try:
            work(peer, end)
        except _AbsentError:
            return _AwayError("")
        except CorruptError as error:
            return _AwayError(str(error))
        except _AwayError as error:
            return error
        return None

    def _addresses(self) -> list[ServerAddress]:
        try:
            return addresses.read_all(self._home, self._run)
        except StorageError as error:
            logger.warning("what nodes serve cannot be found: %s", error)
            return []

    def _in_order(self, nodes: set[int], entry: FileEntry | None, known: dict[int, ServerAddress]) -> list[int]:
        """Nodes of this job first, and of them the one whose rank has written it; what all have, ranks fetch from several."""

        def key(node: int) -> tuple[bool, bool, int]:
            wrote = entry is not None and entry.kind != REPLICATED and node in known and entry.rank in known[node].ranks
            return node not in self._commit.holders, not wrote, (node - self._rank) % (max(nodes) + 1)

        return sorted(nodes - {self._node}, key=key)


def remove_fetched(root: Path) -> None:
    """What a restore that was killed has left."""
    with contextlib.suppress(OSError):
        for path in list(root.iterdir()):
            if path.name.startswith(_PREFIX):
                scratch.remove(path)
