"""The leader of a node: sends rank 0 one message with the answers of all ranks of the node, and tells them what rank 0 says.

It is no more than the rank of the node that got the address. Its members' requests are served by a thread for each connection,
whatever the leader itself is doing just then: its own calls come late if it is slow, but nobody else's do.

An answer waits for those of the other ranks of the node, and at most HOLD_S: then what is there is sent, and the rest follows
in further messages. So a slow rank delays no other answer by more than that, and the round not at all: it waits for it anyway.
A member's call returns when its answer is where rank 0 reads it. If the leader dies before, the member sends it alone.

The first who wants a word listens for it, and all others on the node wait for what comes of that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time

from ckpt.coordinator.base import silent_error, unposted_error
from ckpt.coordinator.waiting import Deadline
from ckpt.coordinator.ways import Carrier, send_alone
from ckpt.coordinator.wire import (
    DONE,
    HEAR,
    HELLO,
    LOST,
    POST,
    READY,
    UNSURE,
    Message,
    Parted,
    Silent,
    Wire,
    is_of_same_user,
)
from ckpt.errors import CheckpointError, ClosedError, StorageError
from ckpt.storage import durable

logger = logging.getLogger("ckpt")

HOLD_S = 0.25
_HOLD_SHARE = 20  # of the time that a gather has, a hold takes this part at most
PULSE_S = 0.5  # how often a member hears that its request is still being worked on
_MOST_WORDS = 8  # that are kept for members which have not asked for them
_MOST_OVER = 64  # keys of words that are known to have been read, and of gathers that lack answers of this node
_ENDING_S = 1.0  # for the threads at close(); they wait for nothing then


@dataclasses.dataclass
class _Batch:
    """Answers that go together.

    Attributes:
        due: on the monotonic clock.
        claimed: by the thread that sends it; then nothing is added.
        failure: why it is not certain to have been sent, once that is known.
    """

    due: float
    answers: dict[int, bytes] = dataclasses.field(default_factory=dict)
    claimed: bool = False
    sent: bool = False
    failure: CheckpointError | None = None

    @property
    def is_over(self) -> bool:
        return self.sent or self.failure is not None


@dataclasses.dataclass
class _Word:
    text: bytes
    unread: set[int]  # ranks of the node


class LeaderWay:
    """See the module.

    Args:
        listener: at the address of the node; closed with this.

    Raises:
        RuntimeError: no thread starts.
    """

    def __init__(self, carrier: Carrier, listener: socket.socket) -> None:
        self._carrier = carrier
        self._listener = listener
        self._warned = False  # that members cannot connect
        self._changed = threading.Condition()
        # Guarded by that:
        self._batches: dict[str, _Batch] = {}  # those that are not claimed
        self._passed: dict[str, set[int]] = {}  # of gathers that lack answers of this node: who has answered; oldest first
        self._words: dict[str, _Word] = {}  # oldest first
        self._over: dict[str, None] = {}  # keys of words that the whole node has read, oldest first
        self._sought: set[str] = set()  # keys of words that a thread listens for
        self._members: dict[Wire, int] = {}
        self._threads: list[threading.Thread] = []
        self._ending = threading.Event()
        porter = threading.Thread(target=self._receive, name="ckpt-node", daemon=True)
        porter.start()
        self._threads.append(porter)

    def post(self, key: str, payload: bytes, timeout_s: float) -> None:
        deadline = self._carrier.post_deadline(timeout_s)
        failure, mine = self._pass_on(key, self._carrier.rank, payload, deadline)
        if failure is None:
            return
        if mine and not isinstance(failure, StorageError):
            raise failure
        send_alone(self._carrier, key, payload, deadline, unsure=not isinstance(failure, StorageError))

    def hear(self, key: str, timeout_s: float) -> bytes:
        return self._hear(key, self._carrier.rank, self._carrier.wait_deadline(key, timeout_s))

    def spoken(self, key: str, word: bytes) -> None:
        with self._changed:
            self._keep(key, word)

    def interrupt(self) -> None:
        with self._changed:
            self._ending.set()
            members = list(self._members)
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for wire in members:
            wire.stop_receiving()

    def close(self) -> None:
        self.interrupt()
        with self._changed:
            threads = list(self._threads)
            for wire in self._members:
                wire.hang_up()
        end = Deadline(_ENDING_S)
        for thread in threads:
            thread.join(end.left_s)
        self._listener.close()

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _pass_on(self, key: str, rank: int, payload: bytes, deadline: Deadline) -> tuple[CheckpointError | None, bool]:
        """Sends an answer together with others.

        Returns:
            Why it is not certain to have been sent, if it is not; and whether it is this thread that has tried to.
        """
        failure: CheckpointError | None = unposted_error(key, rank, "its sending was interrupted")
        mine: _Batch | None = None
        try:
            with self._changed:
                batch = self._batches.get(key)
                if batch is None:
                    batch = self._batches[key] = _Batch(time.monotonic() + min(HOLD_S, deadline.timeout_s / _HOLD_SHARE))
                batch.answers[rank] = payload
                while not batch.claimed and not self._is_due(key, batch):
                    self._changed.wait(max(0.0, batch.due - time.monotonic()))
                if batch.claimed:
                    while not batch.is_over and not deadline.over:
                        self._changed.wait(deadline.left_s)
                    late = unposted_error(key, rank, "the message of its node has not been sent in time")
                    return (batch.failure if batch.is_over else late), False
                mine = batch  # before the claim: whatever interrupts this from now on, the others hear of it
                batch.claimed = True
                del self._batches[key]
                self._note_passed(key, batch)
            failure = self._send(key, batch, deadline)
            return failure, True
        finally:
            if mine is not None:
                with self._changed:
                    mine.failure, mine.sent = failure, failure is None
                    self._changed.notify_all()

    def _is_due(self, key: str, batch: _Batch) -> bool:
        """Needs the lock."""
        here = self._passed.get(key, set()) | batch.answers.keys()
        return self._ending.is_set() or time.monotonic() >= batch.due or here >= self._ranks()

    def _note_passed(self, key: str, batch: _Batch) -> None:
        """Needs the lock."""
        here = self._passed.pop(key, set()) | batch.answers.keys()
        if not here >= self._ranks():
            self._passed[key] = here
            if len(self._passed) > _MOST_OVER:
                del self._passed[next(iter(self._passed))]

    def _send(self, key: str, batch: _Batch, deadline: Deadline) -> CheckpointError | None:
        try:
            durable.crash_point("node-gathered")
            self._carrier.send(key, batch.answers, deadline)
            durable.crash_point("node-posted")
        except CheckpointError as error:
            return error.with_traceback(None)
        return None

    def _ranks(self) -> set[int]:
        """Of this node, whose answers rank 0 waits for. Needs the lock."""
        own = self._carrier.rank
        return {*self._members.values(), own} - {0}

    # ---- words -----------------------------------------------------------------------------------------------------

    def _hear(self, key: str, rank: int, deadline: Deadline) -> bytes:
        mine = False
        try:
            with self._changed:
                while True:
                    if (word := self._words.get(key)) is not None:
                        self._note_read(key, rank)
                        return word.text
                    deadline.check()
                    if key not in self._sought:
                        break
                    if deadline.over:
                        raise silent_error(key, rank, deadline.timeout_s)
                    self._changed.wait(deadline.left_s)
                mine = True  # before the others see it: whatever interrupts this from now on, one of them listens then
                self._sought.add(key)
            text = self._carrier.listen(key, deadline)
            durable.crash_point("node-heard")
            with self._changed:
                self._keep(key, text)
                self._note_read(key, rank)
            return text
        finally:
            if mine:
                with self._changed:
                    self._sought.discard(key)
                    self._changed.notify_all()

    def _keep(self, key: str, text: bytes) -> None:
        """For the others of this node. Needs the lock."""
        if key not in self._words and key not in self._over:
            self._words[key] = _Word(text, self._ranks())
            if len(self._words) > _MOST_WORDS:
                del self._words[next(iter(self._words))]
            self._forget_read()
        self._changed.notify_all()

    def _note_read(self, key: str, rank: int) -> None:
        """Needs the lock."""
        if key in self._words:
            self._words[key].unread.discard(rank)
            self._forget_read()

    def _forget_read(self) -> None:
        """Drops the words that nobody will ask for. Needs the lock."""
        here = self._ranks()
        for key in [key for key, word in self._words.items() if not word.unread & here]:
            del self._words[key]
            self._over[key] = None
            if len(self._over) > _MOST_OVER:
                del self._over[next(iter(self._over))]

    # ---- members ---------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """The porter: lets members in, and keeps telling those that wait that this process lives."""
        pulse = Deadline(PULSE_S)
        while not self._ending.is_set():
            try:
                self._listener.settimeout(PULSE_S if len(self._threads) > 1 else None)
                self._let_in(self._listener.accept()[0])
            except TimeoutError:
                pass
            except OSError as error:
                if self._ending.is_set():
                    return
                if not self._warned:
                    logger.warning("the leader of a node could not take a connection, and goes on trying: %s", error)
                    self._warned = True
                time.sleep(PULSE_S)
            if pulse.over:
                pulse = Deadline(PULSE_S)
                with self._changed:
                    working = [wire for wire in self._members if wire.working]
                for wire in working:
                    wire.pulse()

    def _let_in(self, connection: socket.socket) -> None:
        if not is_of_same_user(connection):
            connection.close()
            return
        thread = threading.Thread(target=self._serve, args=(Wire(connection),), name="ckpt-node", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down, or there are too many threads: the member goes alone
            connection.close()
            return
        with self._changed:
            self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]

    def _serve(self, wire: Wire) -> None:
        """One connection of a member, until it or this ends. The member goes alone from then on."""
        try:
            hello = wire.receive(PULSE_S)
            if hello.kind == HELLO:
                with self._changed:
                    self._members[wire] = int(hello.payload)
                wire.send(Message(READY))
            while not self._ending.is_set() and wire in self._members:
                request = wire.receive()
                wire.working = True
                reply = self._reply(request, self._members[wire])
                wire.working = False
                wire.send(reply)
        except (Parted, Silent, ClosedError):
            pass
        except Exception:
            logger.exception("the leader of a node could not serve a member, which goes alone")
        finally:
            with self._changed:
                self._members.pop(wire, None)
                self._forget_read()
                self._changed.notify_all()  # nobody waits for its answers any more
            wire.close()

    def _reply(self, request: Message, rank: int) -> Message:
        """
        Raises:
            ClosedError: this leads no longer.
        """
        if request.kind == POST:
            deadline = self._carrier.post_deadline(request.seconds)
            failure, _ = self._pass_on(request.key, rank, request.payload, deadline)
            if failure is None:
                return Message(DONE)
            return Message(LOST if isinstance(failure, StorageError) else UNSURE)
        if request.kind == HEAR:
            deadline = self._carrier.wait_deadline(request.key, request.seconds)
            try:
                return Message(DONE, payload=self._hear(request.key, rank, deadline))
            except ClosedError:
                raise
            except CheckpointError:  # of rank 0; the member looks for itself, and says so
                return Message(LOST)
        raise AssertionError(f"a member cannot ask for {request.kind!r}")
