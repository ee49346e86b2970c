"""What every coordinator does, and the account that rank 0 keeps of what may be deleted."""

from __future__ import annotations

import abc
import contextlib
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ckpt.errors import CheckpointError, ClosedError, PeerError

VERDICT_S = 1.0  # how much longer than rank 0 the others wait in exchange(), so that its verdict can still reach them
LINGER_S = 5.0  # how long rank 0 stays at close() for ranks that have not read its last word
PARTING_S = 5.0  # how long what is only posted may take after interrupt()
GRACE_S = 0.5  # after its deadline, for a call that ends by itself to come back before it is abandoned
MOST_UNREAD = 1024  # broadcasts that are kept for ranks that have not read them
MOST_LATE = 64  # failed gathers whose late answers are still expected
MOST_NAMED = 8  # ranks that a message names
_FRAME = struct.Struct("<II")  # rank, length; then so many bytes
OPENING = ".open/"  # keys of our own
_CLOSING = ".close/"


class Coordinator(abc.ABC):
    """The one primitive by which the ranks of a job agree.

    Small messages go to rank 0 (gather) and a small verdict comes back (broadcast); both cost an amount of work that is linear
    in the number of ranks. It may be used from a background thread while the main thread trains, and from several threads
    at once with different keys.

    A key is `stream/name`: what stands before the first slash names its stream (a key without a slash is a stream of its own).
    Every key is used once in a job. On each rank the calls of one stream come one after the other and in the same order; ranks
    may be several keys apart, and different streams may overlap in any way.

    What is deleted, and when. Rank 0 removes the answers to a gather when it has read them. A broadcast is removed when every
    rank has answered a later gather of its stream: it has then returned from the broadcast. If ranks are missing, nobody
    knows what they have read, so broadcasts stay until all answer again, but at most 1,024: the oldest goes first, and who
    still wants it gets PeerError. A late answer to a gather that failed is removed when the late rank has answered a later one.
    So a stream that only broadcasts keeps 1,024 keys, and rank 0 must not run further ahead in it than that.

    Attributes:
        name: of the implementation: "local", "torch", "mpi" or "file".
        rank: this process's, from 0.
        world_size: the number of ranks.
    """

    name: str
    rank: int
    world_size: int

    @abc.abstractmethod
    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
        """Rank 0 gets the payloads of all, in the order of ranks; the others post theirs and get None at once.

        Args:
            timeout_s: how long rank 0 waits for answers, and how long a post may take, seconds.

        Raises:
            PeerError: on rank 0, ranks have not answered in time: it names them and carries the payloads of the others. On
                another rank, the post did not, or may not, get through to where rank 0 would read it.
            StorageError: on another rank, the message could not be written; rank 0 will not get it.
            ClosedError: on rank 0, interrupt() has been called.
        """

    @abc.abstractmethod
    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        """Rank 0 gives the payload and returns at once; the others wait for it. All return it.

        Args:
            payload: ignored but on rank 0.
            timeout_s: how long to wait for rank 0, seconds. Where the broadcast is the verdict on a gather, it must be longer
                than the timeout of that gather.

        Raises:
            PeerError: rank 0 has not given it in time; `ranks` is (0,).
            ClosedError: on another rank than 0, interrupt() has been called.
        """

    @abc.abstractmethod
    def interrupt(self) -> None:
        """Ends every wait for other ranks, for good: those in progress at once, and those that begin later.

        They raise ClosedError. For the end of the process, and for a drain whose deadline is over; from any thread, at any
        time, and more than once. What is only posted still goes out: the answer of a rank to a gather, and what rank 0
        broadcasts; but whatever its timeout, it fails after 5 seconds, as far as it waits for a server and not for a file
        system. close() is still to be called, and stays for as long as ever.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the use of it; closing again does nothing.

        It may take up to 5 seconds: rank 0 stays until the others have closed too, if its last word may still be unread.
        """

    def exchange(self, key: str, payload: bytes, timeout_s: float) -> list[bytes]:
        """Everybody gets the payloads of all, in the order of ranks. Costs world_size² bytes on the wire: for rare use.

        Raises:
            PeerError: ranks have not answered within timeout_s (seconds); every rank that is there gets the same. If rank 0 is
                the one that is missing, the others say so a second later.
            ClosedError: interrupt() has been called. The payload of another rank than 0 has gone out to it all the same.
        """
        try:
            gathered = self.gather(key, payload, timeout_s)
        except PeerError as error:
            if self.rank == 0:
                self.broadcast(key, pack(error.payloads), timeout_s)
            raise
        if gathered is not None:
            self.broadcast(key, pack(dict(enumerate(gathered))), timeout_s)
            return gathered
        answers = unpack(self.broadcast(key, None, timeout_s + VERDICT_S))
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        if missing:
            raise missing_error(key, missing, answers, timeout_s)
        return [answers[rank] for rank in range(self.world_size)]


class Interrupt:
    """The word that this process waits for no other rank any more. For several threads; it cannot be taken back."""

    def __init__(self) -> None:
        self._said = threading.Event()
        self.at = float("inf")  # on the monotonic clock

    def say(self) -> None:
        self.at = min(self.at, time.monotonic())
        self._said.set()

    @property
    def said(self) -> bool:
        return self._said.is_set()

    def sleep(self, seconds: float) -> None:
        """Or until it is said."""
        self._said.wait(seconds)


class Deadline:
    """A moment on the monotonic clock."""

    def __init__(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._at - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left_s == 0.0

    def check(self) -> None:
        """Raises ClosedError if the wait is given up before its time; see Patience."""

    def sleep(self, seconds: float) -> None:
        """But not beyond it.

        Raises:
            ClosedError: as check() does.
        """
        time.sleep(min(seconds, self.left_s))


class Patience(Deadline):
    """How long to wait for other ranks: until a moment, or until the interrupt."""

    def __init__(self, timeout_s: float, interrupt: Interrupt, key: str) -> None:
        super().__init__(timeout_s)
        self._interrupt = interrupt
        self._key = key
        self.check()

    def check(self) -> None:
        if self._interrupt.said:
            raise ClosedError(f"the wait for other ranks, '{self._key}', was given up: this process is closing its checkpoints")

    def sleep(self, seconds: float) -> None:
        self._interrupt.sleep(min(seconds, self.left_s))
        self.check()


class Parting(Deadline):
    """How long a post may take: until a moment, but after the interrupt PARTING_S at most, with the grace."""

    def __init__(self, timeout_s: float, interrupt: Interrupt) -> None:
        super().__init__(timeout_s)
        self._interrupt = interrupt
        self._began = time.monotonic()

    @property
    def left_s(self) -> float:
        last = max(self._began, self._interrupt.at) + PARTING_S - GRACE_S
        return max(0.0, min(self._at, last) - time.monotonic())


class Pace:
    """The growing sleeps of a loop that polls: prompt at first, then about a percent of a core.

    Args:
        first_s, longest_s: the first sleep and the one they grow to, seconds.
    """

    PROMPT_S = 0.05  # how long a wait may be prompt
    SHARE = 100  # after that, a look that costs 1 ms is followed by at least 100 ms of sleep,
    AT_MOST_S = 0.25  # but not by more than this

    def __init__(self, deadline: Deadline, first_s: float, longest_s: float) -> None:
        self._deadline = deadline
        self._first_s = self._sleep_s = first_s
        self._longest_s = longest_s
        self._prompt = Deadline(self.PROMPT_S)
        self._woke = time.thread_time()

    def rest(self, found: bool = False) -> bool:
        """Sleeps; False at once if the deadline is over: there has been a look since.

        Args:
            found: the last look has found something, so the next may come soon.

        Raises:
            ClosedError: the wait is given up.
        """
        if self._deadline.over:
            return False
        self._sleep_s = self._first_s if found else min(self._sleep_s * 1.5, self._longest_s)
        cost_s = 0.0 if found or not self._prompt.over else time.thread_time() - self._woke
        self._deadline.sleep(max(self._sleep_s, min(self.SHARE * cost_s, self.AT_MOST_S)))
        self._woke = time.thread_time()
        return True


class Spent(NamedTuple):
    """Keys that nobody will ask for again."""

    words: list[str]  # of broadcasts
    boxes: list[str]  # of gathers that had failed


class Ledger:
    """Rank 0's account of what may still be read or may still arrive. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unread: dict[str, str] = {}  # guarded by _lock, as the next: key of a broadcast to its stream, oldest first
        self._late: dict[str, set[int]] = {}  # key of a failed gather to the ranks whose answers may still come

    def spoke(self, key: str) -> list[str]:
        """Rank 0 broadcasts `key`. Returns keys of broadcasts that are not kept any longer."""
        with self._lock:
            self._unread[key] = stream_of(key)
            return [self._drop_oldest(self._unread)] if len(self._unread) > MOST_UNREAD else []

    def heard(self, key: str, missing: Iterable[int]) -> Spent:
        """Rank 0 has gathered `key`, but for the missing ranks."""
        stream, absent = stream_of(key), set(missing)
        with self._lock:
            boxes = []
            for late in [late for late in self._late if stream_of(late) == stream]:
                self._late[late] &= absent
                if not self._late[late]:
                    del self._late[late]
                    boxes.append(late)
            if absent:
                self._late[key] = absent
                if len(self._late) > MOST_LATE:
                    boxes.append(self._drop_oldest(self._late))
                return Spent([], boxes)
            read = (stream, stream_of(OPENING))
            words = [word for word, its_stream in self._unread.items() if its_stream in read]
            for word in words:
                del self._unread[word]
            return Spent(words, boxes)

    def is_late(self, key: str) -> bool:
        """Whether the gather of this key has failed before."""
        with self._lock:
            return key in self._late

    def close(self) -> Spent:
        """Everything that is left."""
        with self._lock:
            spent = Spent([*self._unread], [*self._late])
            self._unread.clear()
            self._late.clear()
            return spent

    @property
    def all_read(self) -> bool:
        with self._lock:
            return not self._unread

    @staticmethod
    def _drop_oldest(keys: dict[str, str] | dict[str, set[int]]) -> str:
        oldest = next(iter(keys))
        del keys[oldest]
        return oldest


class Farewell:
    """The end of a coordinator: done once, and not before the others have read rank 0's last word, if they still live.

    Attributes:
        interrupt: says that the end is near; the last meeting of all is still waited for.
    """

    def __init__(self, what: str) -> None:
        self.interrupt = Interrupt()
        self._what = what
        self._lock = threading.Lock()
        self._closed = False  # guarded by _lock

    def check(self) -> None:
        """Raises ClosedError after the end."""
        if self._closed:
            raise ClosedError(f"{self._what} is closed; make a new one")

    def patience(self, key: str, timeout_s: float) -> Deadline:
        """How long to wait for other ranks at this key.

        Raises:
            ClosedError: not at all.
        """
        return Deadline(timeout_s) if key == _CLOSING else Patience(timeout_s, self.interrupt, key)

    def say(self, coordinator: Coordinator, ledger: Ledger) -> Spent | None:
        """Tells rank 0 that this rank is done, or waits on rank 0 until all are; None if that was done before.

        Returns what rank 0 may delete: nothing while ranks are missing, for they may still come and read.
        """
        with self._lock:
            if self._closed:
                return None
            spent = Spent([], [])
            with contextlib.suppress(CheckpointError):
                if coordinator.world_size > 1 and not (coordinator.rank == 0 and ledger.all_read):
                    coordinator.gather(_CLOSING, b"", LINGER_S)
                spent = ledger.close()
            self._closed = True
            return spent


# ---- keys, packets and errors ----------------------------------------------------------------------------------------


def stream_of(key: str) -> str:
    return key.partition("/")[0]


def pack(payloads: Mapping[int, bytes]) -> bytes:
    """Payloads by rank, as bytes."""
    return b"".join(part for rank, payload in payloads.items() for part in (_FRAME.pack(rank, len(payload)), payload))


def unpack(packed: bytes) -> dict[int, bytes]:
    payloads, place = {}, 0
    while place < len(packed):
        rank, length = _FRAME.unpack_from(packed, place)
        place += _FRAME.size
        payloads[rank] = packed[place : place + length]
        place += length
    return payloads


def given(payload: bytes | None, key: str) -> bytes:
    """What rank 0 broadcasts."""
    if payload is None:
        raise ValueError(f"rank 0 must give the payload of the broadcast '{key}'")
    return payload


def missing_error(
    key: str, missing: Iterable[int], answers: Mapping[int, bytes], timeout_s: float, advice: str = ""
) -> PeerError:
    """Of a gather."""
    ranks = sorted(missing)
    return PeerError(
        f"{named(ranks)} did not answer '{key}' within {timeout_s:g} s: dead, stopped, or held up before it; "
        f"look at the logs of those ranks{advice}",
        ranks,
        answers,
    )


def silent_error(key: str, rank: int, timeout_s: float, why: str = "") -> PeerError:
    """Of a rank that has heard nothing from rank 0."""
    cause = why or "dead, stopped, or held up before it"
    return PeerError(f"rank {rank} heard nothing from rank 0 about '{key}' within {timeout_s:g} s: {cause}", (0,))


def unposted_error(key: str, rank: int, why: str) -> PeerError:
    """Of a rank whose post did not, or may not, get through."""
    return PeerError(f"rank {rank} could not post '{key}' to rank 0: {why}", (0,))


def named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
