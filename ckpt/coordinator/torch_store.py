"""A coordinator over the key-value store of torch.distributed: no collectives, no process groups.

Messages to rank 0 are appended to one value, the box of the key, and the answers in them counted; who makes the count full
sets a third key. So rank 0 waits for one key, reads one value and deletes three, however many ranks there are. A broadcast is
one key that all wait for; see grouped.py for who "all" are.

Where the store lies is torch's choice: in the process of rank 0, or in torchrun's agent. An agent keeps its store over
restarts of its workers, with whatever they left in it. So the ranks greet first: each puts down a fresh random id, and rank 0
welcomes every id that it sees, under a key named by that id, with the name of its session; that is a prefix of all other keys.

    greeting-2      frames (rank, id) from everybody; the number is that of the protocol
    welcome/<id>    the name of the session, for the one who has this id
    <session>/<key>/box, count, full, word, word/1, ...
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import struct
import time
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

from ckpt import torch_private
from ckpt.coordinator.answers import PART_BYTES, frames, frames_of, join_answers, pack_answers, parts_of, whole_messages
from ckpt.coordinator.base import VERDICT_S, missing_error, silent_error, unposted_error
from ckpt.coordinator.closing import LINGER_S
from ckpt.coordinator.grouped import OTHER_VERSION, PROTOCOL, GroupedCoordinator
from ckpt.coordinator.key_cleanup import OPENING
from ckpt.coordinator.store_connections import Hung, Lost, StoreConnections, Work, as_timedelta, connector
from ckpt.coordinator.waiting import Deadline
from ckpt.errors import CheckpointError, ClosedError, PeerError

_T = TypeVar("_T")
GREETING_S = 300.0  # for all ranks to come
_LOOK_S = (0.01, 0.5)  # how often rank 0 looks for new greetings, at first and later
DELETING_S = 5.0
READING_S = 5.0  # for reading what has arrived at the deadline
_BATCH = 1024  # keys in one request: the server parses a request anew with each packet of it
_GREETING = f"greeting-{PROTOCOL}"
_OLD_GREETING = "greeting"  # of earlier versions
_PARTS = struct.Struct("<I")  # how many more keys a word has


class StoreCoordinator(GroupedCoordinator):
    """See the module.

    Args:
        store: of torch.distributed; default: that of the default process group.
        rank, world_size: default: those of the default process group.
        timeout_s: how long the ranks wait for each other here, seconds. All of them must come.

    Raises:
        CheckpointError: torch.distributed is not initialised, or has no store.
        PeerError: ranks did not come in time.
    """

    name = "torch"

    def __init__(
        self, store: Any = None, rank: int | None = None, world_size: int | None = None, timeout_s: float = GREETING_S
    ) -> None:
        if store is None or rank is None or world_size is None:
            store, rank, world_size = default_store()
        super().__init__(rank, world_size, "the coordinator over the torch store")
        self._extended = bool(store.has_extended_api())
        self._connections = StoreConnections(connector(store))
        self._parts: dict[str, int] = {}  # words in more than one part; each key is touched by one thread at a time
        self._numbers = itertools.count()  # of the messages of this rank
        self._session = ""
        if world_size > 1:
            try:
                self._greet(timeout_s)
            except BaseException:
                self._leave_node()
                self._connections.close()
                raise

    def close(self) -> None:
        self._connections.end_by(Deadline(LINGER_S))
        spent = self._closing.close(self, self._cleanup)
        if spent is None:
            return
        self.interrupt()  # what is being done for other ranks of the node; they do it themselves now
        self._leave_node()
        doomed = [name for key in spent.words for name in self._word_names(key)]
        doomed += [name for key in spent.boxes for name in self._box_names(key)]
        if doomed:
            self._delete(doomed, Deadline(DELETING_S))
        self._connections.close()

    # ---- to rank 0 -------------------------------------------------------------------------------------------------

    def send(self, key: str, answers: Mapping[int, bytes], deadline: Deadline) -> None:
        number = self.rank << 32 | next(self._numbers)
        message = frames(number, pack_answers(answers))
        try:
            self._connections.call(lambda store: self._post(store, key, message, len(answers)), deadline)
        except (Hung, Lost) as error:
            raise unposted_error(key, self.rank, str(error)) from error

    def _post(self, store: Any, key: str, message: list[bytes], answers: int) -> None:
        """Counts an answer again that has come before, so the count may be full before all have come: see _collect()."""
        box, count, full = self._box_names(key)[:3]
        for part, frame in enumerate(message):
            if self._extended:
                store.append(box, frame)
            else:
                store.set(f"{box}/{self.rank}/{part}", frame)
        if store.add(count, answers) >= self.world_size - 1:
            store.set(full, b"1")

    def _collect(self, key: str, deadline: Deadline) -> dict[int, bytes]:
        box, _, full = self._box_names(key)[:3]

        def wait(store: Any) -> None:
            store.wait([full], as_timedelta(deadline.left_s))

        def read(store: Any) -> dict[int, bytes]:
            return self._read_box(store, box)

        def read_again(store: Any) -> dict[int, bytes]:
            """Whoever comes behind this look makes the count full anew."""
            store.delete_key(full)
            return self._read_box(store, box)

        try:
            while True:
                self._wait_for(wait, deadline)
                for look in (read, read_again):
                    reading = self.wait_deadline(key, max(READING_S, deadline.left_s))
                    answers = self._connections.call(look, reading)
                    if len(answers) == self.world_size - 1 or deadline.over:
                        return answers
        except (Hung, Lost) as error:
            raise CheckpointError(f"rank 0 cannot gather '{key}': {error}") from error

    def _read_box(self, store: Any, box: str) -> dict[int, bytes]:
        if self._extended:
            return join_answers(whole_messages(store.get(box))) if store.check([box]) else {}
        found = b""
        for rank in range(1, self.world_size):
            part, parts = 0, 1
            while part < parts and store.check([name := f"{box}/{rank}/{part}"]):
                frame = store.get(name)
                parts = parts_of(frame)
                found += frame
                part += 1
        return join_answers(whole_messages(found))

    def _forget(self, key: str, missing: list[int]) -> None:
        spent = self._cleanup.heard(key, missing)
        doomed = [name for box in (key, *spent.boxes) for name in self._box_names(box)]
        doomed += [name for word in spent.words for name in self._word_names(word)]
        with contextlib.suppress(ClosedError):
            self._delete(doomed, self.wait_deadline(key, DELETING_S))

    def _delete(self, names: list[str], deadline: Deadline) -> None:
        """Does not fail: what was agreed stands, and whoever needs the store next hears of it."""
        with contextlib.suppress(Hung, Lost):
            self._connections.call(lambda store: delete_all(store, names), deadline)

    # ---- from rank 0 -----------------------------------------------------------------------------------------------

    def _speak(self, key: str, word: bytes, timeout_s: float) -> None:
        """Sets the further parts first: who finds the first finds all."""
        name = f"{self._session}/{key}/word"
        more = [word[place : place + PART_BYTES] for place in range(PART_BYTES, len(word), PART_BYTES)]
        if more:
            self._parts[key] = len(more)
        dropped = [name for old in self._cleanup.spoke(key) for name in self._word_names(old)]

        def say(store: Any) -> None:
            for number, part in enumerate(more, start=1):
                store.set(f"{name}/{number}", part)
            store.set(name, _PARTS.pack(len(more)) + word[:PART_BYTES])
            delete_all(store, dropped)

        try:
            self._connections.call(say, self.post_deadline(timeout_s))
        except (Hung, Lost) as error:
            raise CheckpointError(f"rank 0 cannot broadcast '{key}': {error}") from error

    def listen(self, key: str, deadline: Deadline) -> bytes:
        name = f"{self._session}/{key}/word"

        def get(store: Any) -> bytes:
            store.set_timeout(as_timedelta(deadline.left_s))
            first = store.get(name)
            (more,) = _PARTS.unpack_from(first)
            return b"".join([first[_PARTS.size :], *(store.get(f"{name}/{number}") for number in range(1, more + 1))])

        try:
            word = self._wait_for(get, deadline)
        except Lost as error:
            raise silent_error(key, self.rank, deadline.timeout_s, str(error)) from error
        if word is None:
            raise silent_error(key, self.rank, deadline.timeout_s)
        return word

    def _note_posted(self) -> None:
        """Nothing depends on it."""

    def _wake(self) -> None:
        self._connections.wake()

    def _wait_for(self, work: Work[_T], deadline: Deadline) -> _T | None:
        """What it returns, or None at the deadline; a store that hangs is like a key that is not there."""
        try:
            return self._connections.call(work, deadline)
        except Hung:
            return None
        except Lost:
            if deadline.left_s < 0.01:  # that was the timeout of the wait: there is no one error type for it in all stores
                return None
            raise

    # ---- names -----------------------------------------------------------------------------------------------------

    def _box_names(self, key: str) -> list[str]:
        base = f"{self._session}/{key}"
        names = [f"{base}/box", f"{base}/count", f"{base}/full"]
        if not self._extended:
            names += [f"{base}/box/{rank}/0" for rank in range(1, self.world_size)]
        return names

    def _word_names(self, key: str) -> list[str]:
        name = f"{self._session}/{key}/word"
        return [name, *(f"{name}/{number}" for number in range(1, self._parts.pop(key, 0) + 1))]

    # ---- the beginning ---------------------------------------------------------------------------------------------

    def _greet(self, timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        if self.rank == 0:
            self._session = secrets.token_hex(8)
            self._find_node()
            self._welcome_all(deadline)
            try:
                self.gather(OPENING, b"", deadline.left_s)
            except PeerError as error:
                raise missing_error(OPENING, error.ranks, {}, timeout_s, self._look_for_other_versions()) from None
            self._speak(OPENING, b"", timeout_s)
            self._join_node()
            return
        own = secrets.token_hex(8)
        (frame,) = frames(self.rank, own.encode())

        def greet(store: Any) -> str:
            if self._extended:
                store.append(_GREETING, frame)
            else:
                store.set(f"{_GREETING}/{self.rank}", frame)
            store.set_timeout(as_timedelta(deadline.left_s))
            session = store.get(f"welcome/{own}").decode()
            store.delete_key(f"welcome/{own}")
            return str(session)

        try:
            session = self._wait_for(greet, deadline)
        except Lost as error:
            raise silent_error("greeting", self.rank, timeout_s, str(error)) from error
        if session is None:
            raise silent_error("greeting", self.rank, timeout_s)
        self._session = session
        self._find_node()
        self.gather(OPENING, b"", deadline.left_s)
        self.listen(OPENING, Deadline(deadline.left_s + VERDICT_S))
        self._join_node()

    def _find_node(self) -> None:
        """Not with a store that cannot append: its box has a place for one message of each rank."""
        if self._extended:
            self._claim_node(self._session)

    def _look_for_other_versions(self) -> str:
        """What to say of them, if there are any."""
        with contextlib.suppress(Hung, Lost):
            if self._connections.call(lambda store: bool(store.check([_OLD_GREETING])), Deadline(READING_S)):
                return OTHER_VERSION
        return ""

    def _welcome_all(self, deadline: Deadline) -> None:
        """Welcomes every id, old ones of dead processes too, until all ranks have answered or the time is up."""
        full = self._box_names(OPENING)[2]
        welcomed: dict[str, int] = {}  # id to rank, in order of arrival
        look_s = _LOOK_S[0]

        def welcome(store: Any) -> bool:
            greetings = read_greetings(store, self._extended, self.world_size)
            names = [f"welcome/{own}" for own in greetings if own not in welcomed]
            welcomed.update(greetings)
            set_all(store, self._extended, names, self._session.encode())
            return bool(store.check([full]))

        try:
            while not self._connections.call(welcome, deadline) and not deadline.over:
                time.sleep(min(look_s, deadline.left_s))
                look_s = min(look_s * 1.5, _LOOK_S[1])
        except (Hung, Lost) as error:
            raise CheckpointError(f"rank 0 cannot greet the other ranks: {error}") from error
        latest = {rank: own for own, rank in welcomed.items()}
        stale = [f"welcome/{own}" for own, rank in welcomed.items() if latest[rank] != own]
        greetings = [_GREETING] if self._extended else [f"{_GREETING}/{rank}" for rank in latest]
        self._delete([*greetings, *stale], Deadline(DELETING_S))


# ---- a store, in batches ---------------------------------------------------------------------------------------------


def default_store() -> tuple[Any, int, int]:
    """That of the default process group, with rank and world size."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise CheckpointError(
            "the coordinator 'torch' needs torch.distributed, which is not initialised: call "
            "torch.distributed.init_process_group() first, or choose another coordinator"
        )
    if not has_store():
        raise CheckpointError("torch.distributed was initialised with a backend that has no store (mpi): use coordinator 'mpi'")
    store = torch_private.default_store()
    return _own_store() if store is None else store, dist.get_rank(), dist.get_world_size()


def of_group(group: Any) -> StoreCoordinator:
    """Among the ranks of a process group alone, which must all call this."""
    import torch.distributed as dist

    store, _, _ = default_store()
    ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
    name = f"group-{zlib.crc32(ranks.encode()):08x}-{len(ranks)}"
    return StoreCoordinator(dist.PrefixStore(name, store), dist.get_rank(group), dist.get_world_size(group))


def has_store() -> bool:
    """Whether the default process group has one: that of torch's backend "mpi" has none."""
    from torch import distributed

    return distributed.get_backend() != "mpi" or torch_private.default_store() is not None


_servers: list[Any] = []  # for as long as this process lives


def _own_store() -> Any:
    """A server in rank 0, of whose address it tells the others. A collective."""
    import torch.distributed as dist

    torch_private.warn_once("the ranks agree by a store of our own, and not by that of torch's default process group")
    address: list[Any] = ["", 0]
    if dist.get_rank() == 0:
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        _servers.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False))
        address = [host, _servers[-1].port]
    dist.broadcast_object_list(address, src=0)
    return _servers[-1] if dist.get_rank() == 0 else dist.TCPStore(address[0], address[1], is_master=False)


def set_all(store: Any, extended: bool, names: list[str], value: bytes) -> None:
    for place in range(0, len(names), _BATCH):
        batch = names[place : place + _BATCH]
        if extended:
            store.multi_set(batch, [value] * len(batch))
        else:
            for name in batch:
                store.set(name, value)


def delete_all(store: Any, names: list[str]) -> None:
    for name in names:
        store.delete_key(name)


def read_greetings(store: Any, extended: bool, world_size: int) -> dict[str, int]:
    """Ids of ranks, in order of arrival."""
    names = [_GREETING] if extended else [f"{_GREETING}/{rank}" for rank in range(1, world_size)]
    greetings = {}
    for name in names:
        if store.check([name]):
            for rank, _, _, own in frames_of(store.get(name)):
                greetings[own.decode()] = rank
    return greetings
