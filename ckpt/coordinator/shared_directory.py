"""A coordinator over a directory that all ranks share, for launchers that bring neither a store nor MPI.

    .coordination/hello/<rank>              a fresh random id of that rank
    .coordination/session                   the name of a session, and the ids of the ranks that rank 0 has seen
    .coordination/s-<random>/posts/<key>@<rank>.<number>        the answers that this rank has sent, of its whole node perhaps
    .coordination/s-<random>/words/<key>
    .coordination/s-<random>/reserve/<rank>     room for messages on a full disk: removed when one needs it

Whatever an earlier run left is told from our own by the ids: a rank enters a session only if that names its own fresh id, which
only a rank 0 that lives can have written; and rank 0 writes the session again when a newer hello appears, until all ranks have
entered. Every file gets its name by a rename and is fsynced before, so that no node sees a name without its bytes. The file
system must show new names to other nodes soon: Lustre, GPFS and BeeGFS do; NFS caches directories for some seconds, unless
mounted with small `acdirmax` and `lookupcache=none`. One job at a time may use a directory.

A full disk is what ranks have to tell each other of, so each keeps a reserve on it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from ckpt.coordinator.answers import pack_answers, unpack_answers
from ckpt.coordinator.base import VERDICT_S, missing_error, silent_error, unposted_error
from ckpt.coordinator.grouped import OTHER_VERSION, PROTOCOL, GroupedCoordinator
from ckpt.coordinator.key_cleanup import OPENING
from ckpt.coordinator.launchers import VARIABLES, names_of, world_of
from ckpt.coordinator.waiting import Deadline, Pace
from ckpt.errors import CheckpointError, StorageError
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock

FOLDER = ".coordination"
HELLO_S = 300.0  # for all ranks to come
_PACE_S = (0.001, 0.05)  # first and longest sleep between looks
_ID = f"{PROTOCOL}."  # how the ids of this protocol begin
_ID_BYTES = len(_ID) + 16
_HEADER_BYTES = 32  # of the file `session`: its name, filled up with spaces; then the ids, from rank 0 on
_LONGEST_NAME = 150  # bytes; the file system takes 255, and temporary names are longer
RESERVE_BYTES = 64 << 10
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FileCoordinator(GroupedCoordinator):
    """See the module.

    Args:
        directory: shared by all ranks; made if it is not there.
        rank, world_size: default: what the launcher has put into the environment.
        timeout_s: how long the ranks wait for each other here, seconds. All of them must come.

    Raises:
        CheckpointError: rank and world size are not known.
        PeerError: ranks did not come in time.
        StorageError: the directory cannot be written.
    """

    name = "file"

    def __init__(
        self, directory: Path, rank: int | None = None, world_size: int | None = None, timeout_s: float = HELLO_S
    ) -> None:
        origin = ""
        if rank is None or world_size is None:
            rank, world_size, origin = _known_world()
        super().__init__(rank, world_size, f"the coordinator over '{directory}'")
        self._root = directory / FOLDER
        self._session = self._root / "none"
        self._reserve = _Reserve(self._session)
        self._numbers = itertools.count()  # of the messages of this rank
        if world_size > 1:
            durable.make_directory(directory, durable=True)  # checkpoints may go into it
            durable.make_directory(self._root / "hello", durable=False)
            try:
                (self._open if rank == 0 else self._enter)(timeout_s, origin)
            except BaseException:
                self._leave_node()
                raise
            self._reserve = _Reserve(self._session / "reserve" / str(rank))
            self._reserve.lay_by()
            self._join_node()

    def close(self) -> None:
        everybody_read = self.world_size > 1 and self.rank == 0 and self._cleanup.all_read
        spent = self._closing.close(self, self._cleanup)
        if spent is None or self.world_size == 1:
            return
        self.interrupt()  # what is being done for other ranks of the node; they do it themselves now
        self._leave_node()
        self._reserve.remove()
        if self.rank != 0:
            return
        self._alive.release()
        if everybody_read or spent.words:  # else ranks are missing that may still come and read: the next run removes it
            with contextlib.suppress(OSError):
                durable.remove_tree(self._session)
            durable.remove_if_empty(self._root / "hello")
            durable.remove_if_empty(self._root)

    # ---- messages --------------------------------------------------------------------------------------------------

    def _put(self, path: Path, content: bytes) -> None:
        """Where the disk is full, in the place of the reserve."""
        try:
            durable.replace_quickly(path, content)
        except StorageError as error:
            if error.errno not in _FULL:
                raise
            self._reserve.give_up()
            durable.replace_quickly(path, content)
        else:
            self._reserve.renew()

    def send(self, key: str, answers: Mapping[int, bytes], deadline: Deadline) -> None:
        path = self._session / "posts" / f"{_name(key)}@{self.rank}.{next(self._numbers)}"
        try:
            self._put(path, pack_answers(answers))
        except StorageError as error:
            if error.errno in _GONE:
                why = "it has removed the session: closed, or started anew without this rank"
                raise unposted_error(key, self.rank, why) from error
            if error.filename == str(path):  # it is the rename that failed, or has been made and the answer to it was lost
                raise unposted_error(key, self.rank, str(error)) from error
            raise

    def _collect(self, key: str, deadline: Deadline) -> dict[int, bytes]:
        """Reads and removes messages as they come."""
        answers: dict[int, bytes] = {}
        pace, stem = Pace(deadline, *_PACE_S), _name(key)
        while True:
            before = len(answers)
            for path, _ in self._posts({stem}):
                if (message := _get(path)) is not None:
                    answers |= unpack_answers(message)
                    durable.remove_quietly(path)
            if len(answers) == self.world_size - 1 or not pace.rest(found=len(answers) > before):
                return answers

    def _forget(self, key: str, missing: list[int]) -> None:
        spent = self._cleanup.heard(key, missing)
        for word in spent.words:
            durable.remove_quietly(self._word_path(word))
        if spent.boxes:
            for path, _ in self._posts({_name(box) for box in spent.boxes}):
                durable.remove_quietly(path)

    def _speak(self, key: str, word: bytes, timeout_s: float) -> None:
        dropped = self._cleanup.spoke(key)
        self._put(self._word_path(key), word)
        for old in dropped:
            durable.remove_quietly(self._word_path(old))

    def listen(self, key: str, deadline: Deadline) -> bytes:
        pace, path = Pace(deadline, *_PACE_S), self._word_path(key)
        while (word := _get(path)) is None:
            if not pace.rest():
                raise silent_error(key, self.rank, deadline.timeout_s)
        return word

    def _note_posted(self) -> None:
        """There has been room for it: a rank for which its leader sends needs its own reserve if the leader dies."""
        self._reserve.renew()

    def _wake(self) -> None:
        """Nothing waits without looking."""

    def _posts(self, stems: set[str]) -> Iterator[tuple[Path, int]]:
        """The messages for some keys that are there now, and who has sent them: one listing, whatever the number of ranks."""
        folder = self._session / "posts"
        for name in os.listdir(folder):
            stem, _, sender = name.rpartition("@")
            rank, _, number = sender.partition(".")
            if stem in stems and rank.isdigit() and number.isdigit():
                yield folder / name, int(rank)

    def _word_path(self, key: str) -> Path:
        return self._session / "words" / _name(key)

    # ---- the beginning ---------------------------------------------------------------------------------------------

    def _enter(self, timeout_s: float, origin: str) -> None:
        """Says hello, waits for a session that names us, and enters it."""
        deadline = Deadline(timeout_s)
        own = (_ID + secrets.token_hex(8)).encode()
        hello = self._root / "hello" / str(self.rank)
        durable.replace_quickly(hello, own)
        pace = Pace(deadline, *_PACE_S)
        while (session := _session_naming(self._root / "session", self.rank, own)) is None:
            if not pace.rest():
                durable.remove_quietly(hello)
                why = f"nobody opened a session in '{self._root}'{origin}"
                raise silent_error("hello", self.rank, timeout_s, why)
        self._session = self._root / session
        self._claim_node(session)
        self.gather(OPENING, own, timeout_s)
        self.listen(OPENING, Deadline(deadline.left_s + VERDICT_S))

    def _open(self, timeout_s: float, origin: str) -> None:
        """Makes a session, names in it whoever has said hello, and waits until all have entered."""
        for name in os.listdir(self._root):
            if name.startswith("s-"):
                _remove_if_dead(self._root / name)
        self._session = self._root / f"s-{secrets.token_hex(8)}"
        durable.make_directory(self._session, durable=False)
        self._alive = DirectoryLock(self._session)
        self._alive.acquire()
        for folder in ("posts", "words", "reserve"):
            durable.make_directory(self._session / folder, durable=False)
        self._claim_node(self._session.name)
        entered = self._await_all(Deadline(timeout_s))
        missing = [rank for rank in range(1, self.world_size) if rank not in entered]
        durable.remove_quietly(self._root / "session")
        if missing:
            self._alive.release()
            with contextlib.suppress(OSError):
                durable.remove_tree(self._session)
            advice = OTHER_VERSION if _are_of_other_versions(self._root / "hello") else ""
            raise missing_error(f"hello in {self._root}", missing, {}, timeout_s, origin + advice)
        for name in os.listdir(self._root / "hello"):
            durable.remove_quietly(self._root / "hello" / name)
        self.broadcast(OPENING, b"", timeout_s)

    def _await_all(self, deadline: Deadline) -> set[int]:
        pace = Pace(deadline, *_PACE_S)
        hellos = _Hellos(self._root / "hello", self.world_size)
        entered: set[int] = set()
        while True:
            before = len(entered)
            if hellos.look() and len(hellos.ids) == self.world_size - 1:
                durable.replace_quickly(self._root / "session", hellos.session_file(self._session.name))
            for path, rank in self._posts({_name(OPENING)}):
                own = unpack_answers(_get(path) or b"").get(rank)
                if own is not None and own == hellos.ids.get(rank):  # else it is of a process that a new one has replaced
                    entered.add(rank)
                durable.remove_quietly(path)
            if len(entered) == self.world_size - 1 or not pace.rest(found=len(entered) > before):
                return entered


def _remove_if_dead(session: Path) -> None:
    """A session whose rank 0 has ended; the lock that it holds tells."""
    lock = DirectoryLock(session)
    with contextlib.suppress(CheckpointError, OSError):
        lock.acquire()
        try:
            durable.remove_tree(session)
        finally:
            lock.release()


class _Reserve:
    """A file that gives its room on the disk to a message that finds none. For several threads; never fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._wanted = False  # it is to be there, but is not; guarded by _lock, and so is the file

    def lay_by(self) -> None:
        """Writes it, if there is room."""
        with self._lock:
            self._wanted = True
            with contextlib.suppress(StorageError):
                durable.replace_quickly(self._path, secrets.token_bytes(RESERVE_BYTES))  # zeros may take no room
                self._wanted = False

    def give_up(self) -> None:
        with self._lock:
            self._wanted = True
            durable.remove_quietly(self._path)

    def renew(self) -> None:
        """There has been room for a message: perhaps there is for the reserve."""
        if self._wanted:
            self.lay_by()

    def remove(self) -> None:
        with self._lock:
            self._wanted = False
            durable.remove_quietly(self._path)


class _Hellos:
    """The hellos that rank 0 has seen. A hello that replaces another has another inode, so each is read once."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.ids: dict[int, bytes] = {}
        self._folder = folder
        self._world_size = world_size
        self._inodes: dict[int, int] = {}

    def look(self) -> bool:
        """Whether there are new ones."""
        changed = False
        with os.scandir(self._folder) as entries:
            for entry in entries:
                rank = int(entry.name) if entry.name.isdigit() else 0
                if not 0 < rank < self._world_size or self._inodes.get(rank) == entry.inode():
                    continue
                own = _get(Path(entry.path))
                if own is not None and _is_id(own):
                    self._inodes[rank] = entry.inode()
                    changed |= self.ids.get(rank) != own
                    self.ids[rank] = own
        return changed

    def session_file(self, session: str) -> bytes:
        ids = b"".join(self.ids.get(rank, b" " * _ID_BYTES) for rank in range(self._world_size))
        return session.encode().ljust(_HEADER_BYTES) + ids


def _session_naming(path: Path, rank: int, own: bytes) -> str | None:
    """The session in this file, if it names the id `own` for the rank. Reads just that: all ranks do this at once."""
    try:
        with open(path, "rb", buffering=0) as file:
            header = file.read(_HEADER_BYTES)
            file.seek(_HEADER_BYTES + _ID_BYTES * rank)
            named = file.read(_ID_BYTES)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    return header.decode().strip() if named == own else None


def _is_id(content: bytes) -> bool:
    """Of a rank with this protocol."""
    return len(content) == _ID_BYTES and content.startswith(_ID.encode())


def _are_of_other_versions(hello: Path) -> bool:
    """Whether ranks with another protocol have been here, in this run or in one that crashed."""
    found = [_get(hello / name) for name in os.listdir(hello)]
    return any(own is not None and not _is_id(own) for own in found)


def _known_world() -> tuple[int, int, str]:
    """Rank, world size, and what to say of them where ranks are missing."""
    world, names = world_of(os.environ), names_of(os.environ)
    if world is None or names is None:
        pairs = ", ".join(f"{rank}/{size}" for rank, size in VARIABLES)
        raise CheckpointError(
            f"the coordinator 'file' does not know rank and world size: none of {pairs} is in the environment; "
            "set RANK and WORLD_SIZE for each process"
        )
    origin = (
        f"; this is rank {world[0]} of {world[1]} as {names[0]} and {names[1]} say in the environment: if they are wrong, and "
        'this process runs alone, choose coordinator="local"'
    )
    return *world, origin


# ---- files -----------------------------------------------------------------------------------------------------------


def _name(key: str) -> str:
    """A file name for a key."""
    name = quote(key, safe="")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:80]}~{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _get(path: Path) -> bytes | None:
    """None if it is not there."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
