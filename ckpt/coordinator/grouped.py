"""What the coordinators over a store and over a directory have in common: the ranks of a node make one message together.

To rank 0 a message costs much the same however many answers it holds. So the leader of each node sends those of all its ranks,
and the leaders alone listen for the word of rank 0. The leader is whoever listens at the address of the node: rank 0 on its
node, else whom the launcher has given the local rank 0, else the first. Leaders are there before rank 0 has heard of all ranks,
and the others look for them when it says that it has; who finds none takes the place.
"""

from __future__ import annotations

import abc
import os
import socket
import time
from collections.abc import Mapping

from ckpt.coordinator.base import Coordinator, given, missing_error
from ckpt.coordinator.closing import OrderlyClose
from ckpt.coordinator.key_cleanup import KeyCleanup
from ckpt.coordinator.launchers import local_rank
from ckpt.coordinator.leader import LeaderWay
from ckpt.coordinator.member import MemberWay, greet
from ckpt.coordinator.waiting import Deadline, PostDeadline
from ckpt.coordinator.ways import AloneWay, Way
from ckpt.coordinator.wire import address_of, listen_at

# Of what ranks say to each other. Ranks with another one are not heard, and named as missing when a coordinator is made.
PROTOCOL = 2
_LOOKING_S = 1.0  # for a leader that has got the address, but does not listen yet
_LOOK_S = 0.01
OTHER_VERSION = "; ranks with another version of lazyckpt are there: all ranks of a job must have the same"


class GroupedCoordinator(Coordinator):
    """See the module.

    Args:
        what: it is, for errors.
    """

    def __init__(self, rank: int, world_size: int, what: str) -> None:
        self.rank, self.world_size = rank, world_size
        self._cleanup = KeyCleanup()
        self._closing = OrderlyClose(what)
        self._way: Way = AloneWay(self)
        self._address: str | None = None
        self._listener: socket.socket | None = None  # between claim_node() and join_node()

    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
        self._closing.check()
        if self.rank != 0:
            self._way.post(key, payload, timeout_s)
            self._note_posted()
            return None
        answers = {0: payload}
        if self.world_size > 1:
            answers |= self._collect(key, self.wait_deadline(key, timeout_s))
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        if self.world_size > 1:
            self._forget(key, missing)
        if missing:
            raise missing_error(key, missing, answers, timeout_s)
        return [answers[rank] for rank in range(self.world_size)]

    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        self._closing.check()
        if self.rank != 0:
            return self._way.hear(key, timeout_s)
        word = given(payload, key)
        if self.world_size > 1:
            self._speak(key, word, timeout_s)
            self._way.spoken(key, word)
        return word

    def interrupt(self) -> None:
        self._closing.interrupt.say()
        self._wake()
        self._way.interrupt()

    def wait_deadline(self, key: str, timeout_s: float) -> Deadline:
        return self._closing.deadline_for(key, timeout_s)

    def post_deadline(self, timeout_s: float) -> Deadline:
        return PostDeadline(timeout_s, self._closing.interrupt)

    # ---- what carries messages between nodes -----------------------------------------------------------------------

    @abc.abstractmethod
    def send(self, key: str, answers: Mapping[int, bytes], deadline: Deadline) -> None:
        """See Carrier."""

    @abc.abstractmethod
    def listen(self, key: str, deadline: Deadline) -> bytes:
        """See Carrier."""

    @abc.abstractmethod
    def _note_posted(self) -> None:
        """This rank's answer has got through, whoever has sent it."""

    @abc.abstractmethod
    def _collect(self, key: str, deadline: Deadline) -> dict[int, bytes]:
        """On rank 0: the answers of the others, as far as they have come by the deadline."""

    @abc.abstractmethod
    def _forget(self, key: str, missing: list[int]) -> None:
        """On rank 0: removes what nobody will ask for, now that `key` is gathered."""

    @abc.abstractmethod
    def _speak(self, key: str, word: bytes, timeout_s: float) -> None:
        """On rank 0: to all."""

    @abc.abstractmethod
    def _wake(self) -> None:
        """Lets what waits look at its deadline again."""

    # ---- the node --------------------------------------------------------------------------------------------------

    def _claim_node(self, session: str) -> None:
        """Takes the place of the leader, if it is this rank's. Before rank 0 can have heard of this rank."""
        self._address = address_of(session)
        if self._address is not None and (self.rank == 0 or local_rank(os.environ) in (None, 0)):
            self._listener = listen_at(self._address)

    def _join_node(self) -> None:
        """When rank 0 has heard of all ranks."""
        if self._address is None or (self.rank == 0 and self._listener is None):
            return  # rank 0 is no member, whose words would go through another rank: where no name is given, it goes alone
        wire = None
        end = Deadline(_LOOKING_S)
        while self._listener is None and wire is None and not end.over:
            wire = greet(self._address, self.rank)
            if wire is None:
                time.sleep(_LOOK_S)
                self._listener = listen_at(self._address)
        if self._listener is not None:
            self._lead(self._listener)
        else:
            self._way = MemberWay(self, self._address, wire)

    def _lead(self, listener: socket.socket) -> None:
        try:
            self._way = LeaderWay(self, listener)
            self._listener = None
        except RuntimeError:  # no thread starts: all go alone
            self._leave_node()

    def _leave_node(self) -> None:
        """Before or after this rank has joined it."""
        self._way.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
