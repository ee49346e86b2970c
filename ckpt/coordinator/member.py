"""A member of a node: gives its answers to the leader, and hears rank 0 from it. Without the leader it goes alone.

What shows that the leader is gone: the connection ends, or nothing comes through it, not even a pulse. Then this call goes on
alone, and so do all others for a while.
"""

from __future__ import annotations

import threading

from ckpt.coordinator.leader import PULSE_S
from ckpt.coordinator.waiting import Deadline
from ckpt.coordinator.ways import Carrier, send_alone
from ckpt.coordinator.wire import DONE, HEAR, HELLO, LOST, POST, PULSE, READY, UNSURE, Message, Parted, Silent, Wire, connect_to

SILENCE_S = 3.0  # without a pulse: the leader is stopped, or held up
_SILENCE_SHARE = 4  # of the time that a call has, this part at most: so that there is some left to go alone
_LEAST_SILENCE_S = 2.5 * PULSE_S
REST_S = 10.0  # before a leader that failed is tried again


class MemberWay:
    """See the module.

    Args:
        address: of the node.
        first: a connection to the leader, from greet(), if there is one already.
    """

    def __init__(self, carrier: Carrier, address: str, first: Wire | None) -> None:
        self._carrier = carrier
        self._address = address
        self._lock = threading.Lock()
        # Guarded by that:
        self._idle = [first] if first is not None else []
        self._in_use: set[Wire] = set()
        self._rest: Deadline | None = None  # until then this rank goes alone
        self._ending = threading.Event()

    def post(self, key: str, payload: bytes, timeout_s: float) -> None:
        deadline = self._carrier.post_deadline(timeout_s)
        reply = self._ask(Message(POST, key, payload), deadline)
        if reply.kind != DONE:
            send_alone(self._carrier, key, payload, deadline, unsure=reply.kind == UNSURE)

    def hear(self, key: str, timeout_s: float) -> bytes:
        deadline = self._carrier.wait_deadline(key, timeout_s)
        reply = self._ask(Message(HEAR, key), deadline)
        if reply.kind == DONE:
            return reply.payload
        deadline.check()
        return self._carrier.listen(key, deadline)

    def spoken(self, key: str, word: bytes) -> None:
        raise AssertionError("rank 0 is no member")

    def interrupt(self) -> None:
        with self._lock:
            self._ending.set()
            in_use = list(self._in_use)
        for wire in in_use:
            wire.hang_up()

    def close(self) -> None:
        self.interrupt()
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    # ---- the leader ------------------------------------------------------------------------------------------------

    def _ask(self, request: Message, deadline: Deadline) -> Message:
        """What the leader says to that: DONE; LOST: it has not done it; UNSURE: it may have."""
        patience_s = min(SILENCE_S, max(_LEAST_SILENCE_S, deadline.timeout_s / _SILENCE_SHARE))
        wire = self._take(patience_s)
        if wire is None:
            return Message(LOST)
        try:
            wire.send(request._replace(seconds=deadline.left_s), patience_s)
            reply = wire.receive(_positive(min(patience_s, deadline.left_s)))
            while reply.kind == PULSE:
                reply = wire.receive(_positive(min(patience_s, deadline.left_s)))
        except Silent:
            if not deadline.over:
                self._begin_rest()
            self._drop(wire)
            return Message(UNSURE)
        except Parted:
            self._begin_rest()
            self._drop(wire)
            return Message(UNSURE)
        except BaseException:  # an interrupt: the reply would be taken for that to the next request
            self._drop(wire)
            raise
        self._give_back(wire)
        return reply

    def _take(self, patience_s: float) -> Wire | None:
        """A connection for one request; None: there is no leader, for now at least."""
        with self._lock:
            if self._ending.is_set() or (self._rest is not None and not self._rest.over):
                return None
            if self._idle:
                wire = self._idle.pop()
                self._in_use.add(wire)
                return wire
        made = greet(self._address, self._carrier.rank, patience_s)
        with self._lock:
            if made is None or self._ending.is_set():
                self._rest = Deadline(REST_S)
            else:
                self._in_use.add(made)
                return made
        if made is not None:
            made.close()
        return None

    def _begin_rest(self) -> None:
        """The leader counts on nobody who has no connection: it does not wait for this rank meanwhile."""
        with self._lock:
            self._rest = Deadline(REST_S)
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _drop(self, wire: Wire) -> None:
        with self._lock:
            self._in_use.discard(wire)
        wire.close()

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            self._in_use.discard(wire)
            kept = not self._ending.is_set() and (self._rest is None or self._rest.over)
            if kept:
                self._idle.append(wire)
        if not kept:
            wire.close()


def greet(address: str, rank: int, patience_s: float = SILENCE_S) -> Wire | None:
    """A connection to the leader of the node, who counts on this rank from now on; None if there is none."""
    wire: Wire | None = None
    try:
        wire = connect_to(address, patience_s)
        if wire is None:
            return None
        wire.send(Message(HELLO, payload=b"%d" % rank), patience_s)
        if wire.receive(patience_s).kind == READY:
            return wire
    except (Parted, Silent):
        pass
    except BaseException:
        if wire is not None:
            wire.close()
        raise
    if wire is not None:
        wire.close()
    return None


def _positive(seconds: float) -> float:
    """A timeout of 0 would not wait, but fail at once in another way."""
    return max(seconds, 0.001)
