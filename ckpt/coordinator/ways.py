"""How the messages of a rank come to rank 0, and how it hears rank 0: by itself, or together with the other ranks of its node.

    alone      it sends its answer, and listens for the word of rank 0
    leader     of a node: sends one message with the answers of all its ranks, and tells them what it has heard     leader.py
    member     of a node: gives its answer to the leader, and asks it for the word                                  member.py

Every rank can go alone at any moment, and a member does when its leader dies, is stopped, or fails. An answer may come twice
then; it is the same, so that harms nobody. No word is taken from anyone but rank 0: a leader tells what rank 0 has said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ckpt.coordinator.base import unposted_error
from ckpt.coordinator.waiting import Deadline
from ckpt.errors import StorageError


class Carrier(Protocol):
    """What carries messages between nodes."""

    rank: int

    def send(self, key: str, answers: Mapping[int, bytes], deadline: Deadline) -> None:
        """One message to rank 0; from any thread.

        Raises:
            PeerError, StorageError: as gather() does.
        """

    def listen(self, key: str, deadline: Deadline) -> bytes:
        """The word of rank 0; from any thread. It looks at least once, also if the deadline is over.

        Raises:
            PeerError, ClosedError: as broadcast() does.
        """

    def wait_deadline(self, key: str, timeout_s: float) -> Deadline:
        """For a wait for other ranks.

        Raises:
            ClosedError: as broadcast() does.
        """

    def post_deadline(self, timeout_s: float) -> Deadline:
        """For what is only posted."""


class Way(Protocol):
    """That of one rank. For several threads."""

    def post(self, key: str, payload: bytes, timeout_s: float) -> None:
        """As gather() on another rank than 0."""

    def hear(self, key: str, timeout_s: float) -> bytes:
        """As broadcast() on another rank than 0."""

    def spoken(self, key: str, word: bytes) -> None:
        """On rank 0: what it has just said to all."""

    def interrupt(self) -> None:
        """As Coordinator.interrupt(), behind which it comes. A leader leads no longer."""

    def close(self) -> None:
        """Ends all threads and connections of it. The calls of others have ended, but for what is done for members."""


class AloneWay:
    """See the module."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def post(self, key: str, payload: bytes, timeout_s: float) -> None:
        send_alone(self._carrier, key, payload, self._carrier.post_deadline(timeout_s))

    def hear(self, key: str, timeout_s: float) -> bytes:
        return self._carrier.listen(key, self._carrier.wait_deadline(key, timeout_s))

    def spoken(self, key: str, word: bytes) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def send_alone(carrier: Carrier, key: str, payload: bytes, deadline: Deadline, unsure: bool = False) -> None:
    """
    Args:
        unsure: an attempt to send it together with others may have got through.

    Raises:
        StorageError: rank 0 will not get it: so not if that is unsure.
        PeerError: it may or may not.
    """
    try:
        carrier.send(key, {carrier.rank: payload}, deadline)
    except StorageError as error:
        if unsure:
            raise unposted_error(key, carrier.rank, str(error)) from error
        raise
