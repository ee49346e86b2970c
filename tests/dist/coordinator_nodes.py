"""Scenarios of a coordinator whose ranks speak by node. Those in OF_NODES: 2 nodes with 2 ranks each, one after the other."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import psutil
from dist.coordinator_calls import SHORT_S, TIMEOUT_S, expect_missing, meet, payload_of
from dist.exchange import exchange
from support import patience, wait_until

from ckpt import _native
from ckpt.coordinator import Coordinator
from ckpt.coordinator.member import MemberWay

LEADER, MEMBER = 2, 3  # of the node that has not rank 0
PATIENT_S = 6.0  # long enough for a member to notice that its leader is stopped, and to go alone
MISSING_S = 3.0  # for all that live to answer, also on a busy machine, while one does not
NODE_POINTS = {"node-gathered": (LEADER,), "node-posted": (), "node-heard": ()}  # and who is missed then


def messages(c: Coordinator) -> None:
    """One message a node brings the answers of all, and one rank a node listens for the word."""
    sent: list[list[int]] = []
    heard: list[int] = []
    send, listen, key = c.send, c.listen, "messages/1"  # type: ignore[attr-defined]

    def counted_send(its_key: str, answers: dict[int, bytes], deadline: Any) -> None:
        sent.extend([sorted(answers)] if its_key == key else [])
        send(its_key, answers, deadline)

    def counted_listen(its_key: str, deadline: Any) -> bytes:
        heard.extend([c.rank] if its_key == key else [])
        return bytes(listen(its_key, deadline))

    connect(c, "messages/connected")
    with all_held(), mock.patch.multiple(c, send=counted_send, listen=counted_listen):
        meet(c, "messages/0")
        meet(c, key)
        meet(c, "messages/2")
    said = [json.loads(text) for text in exchange(c, "messages/3", json.dumps([sent, heard]).encode(), TIMEOUT_S)]
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = [[rank for rank in range(first, first + ranks) if rank > 0] for first in range(0, c.world_size, ranks)]
    assert sorted(message for own, _ in said for message in own) == [node for node in nodes if node]
    assert [rank for _, own in said for rank in own if rank > 0] == [node[0] for node in nodes[1:]], "who leads listens, once"


def connect(c: Coordinator, key: str) -> None:
    """Leaders have their members, also where one was stopped before, or held up."""
    with patient_members():
        if isinstance(way := c._way, MemberWay):  # type: ignore[attr-defined]
            way._rest = None
        meet(c, key)


def patient_members() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.multiple("ckpt.coordinator.member", SILENCE_S=TIMEOUT_S, _SILENCE_SHARE=1)


def all_held() -> contextlib.AbstractContextManager[Any]:
    """A leader waits for the answers of all ranks of its node, and they for it, however slow this machine is just now.

    For ranks that are connected: it would wait for what it has sent before one came.
    """
    held = contextlib.ExitStack()
    held.enter_context(mock.patch.multiple("ckpt.coordinator.leader", HOLD_S=TIMEOUT_S, _HOLD_SHARE=1))
    held.enter_context(patient_members())
    return held


def stopped_leader(c: Coordinator) -> None:
    """Only the leader is missed, and its member has answered and hears the outcome."""
    pids = [int(pid) for pid in exchange(c, "stopped-leader/pids", b"%d" % os.getpid(), TIMEOUT_S)]
    if c.rank == LEADER:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        wait_until(lambda: psutil.Process(pids[LEADER]).status() == psutil.STATUS_STOPPED, TIMEOUT_S, "the stop")
    try:
        error = expect_missing((LEADER,), lambda: exchange(c, "stopped-leader/1", b"%d" % c.rank, PATIENT_S), PATIENT_S)
        assert error.payloads == {rank: b"%d" % rank for rank in range(c.world_size) if rank != LEADER}
        meet_without(c, (LEADER,), "stopped-leader/2") if c.rank != LEADER else None
    finally:
        os.kill(pids[LEADER], signal.SIGCONT) if c.rank == 0 else None
    if c.rank == LEADER:
        expect_missing((LEADER,), lambda: exchange(c, "stopped-leader/2", b"", SHORT_S))
    for number in range(3, 8):
        meet(c, f"stopped-leader/{number}")
    c.close()  # rank 0 takes the store with it


def meet_without(c: Coordinator, dead: tuple[int, ...], key: str) -> None:
    error = expect_missing(dead, lambda: exchange(c, key, payload_of(c.rank, key), MISSING_S), MISSING_S)
    assert error.payloads == {rank: payload_of(rank, key) for rank in range(c.world_size) if rank not in dead}


def part_without(c: Coordinator, dead: tuple[int, ...], key: str) -> None:
    """Rank 0 stays until the others have heard what it said last."""
    meet_without(c, dead, key)
    if c.rank == 0:
        expect_missing(dead, lambda: c.gather(f"{key}-end", b"", MISSING_S), MISSING_S)
    else:
        c.gather(f"{key}-end", b"", MISSING_S)


def killed_leader(c: Coordinator) -> None:
    """While the others wait: its member through it, for the word of rank 0."""
    meet(c, "killed-leader/1")
    if c.rank == LEADER:
        c.gather("killed-leader/2", b"last", TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGKILL)
    if c.rank == 0:
        assert (c.gather("killed-leader/2", b"", TIMEOUT_S) or [])[LEADER] == b"last"
        time.sleep(0.3)  # the member waits by then, mostly
        c.broadcast("killed-leader/2", b"word", TIMEOUT_S)
    else:
        c.gather("killed-leader/2", b"", TIMEOUT_S)
        started = time.monotonic()
        assert c.broadcast("killed-leader/2", None, TIMEOUT_S) == b"word"
        assert time.monotonic() - started < patience(3)
    part_without(c, (LEADER,), "killed-leader/3")


def killed_at(c: Coordinator, point: str) -> None:
    """The leader dies while it does what it does for its node; if it had sent all answers, nobody is missed yet."""
    connect(c, f"{point}/0")
    with contextlib.nullcontext() if NODE_POINTS[point] else all_held():  # before its member can post the next answer
        meet(c, f"{point}/1")
        if c.rank == LEADER:
            _native.set_crash_point(point, 0)
            exchange(c, f"{point}/2", payload_of(LEADER, f"{point}/2"), TIMEOUT_S)
            raise AssertionError("it lives")
    if NODE_POINTS[point]:
        meet_without(c, NODE_POINTS[point], f"{point}/2")
    else:
        meet(c, f"{point}/2")
    part_without(c, (LEADER,), f"{point}/3")


def forked_leader(c: Coordinator) -> None:
    """A child of the leader, as a DataLoader's worker is one, outlives it: its member is told all the same."""
    meet(c, "forked-leader/1")
    if c.rank == LEADER:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    if c.rank == 0:
        expect_missing((LEADER,), lambda: c.gather("forked-leader/2", b"", MISSING_S), MISSING_S)
    else:
        c.gather("forked-leader/2", b"", 60.0)
        assert time.monotonic() - started < patience(1.5), "it has waited for a leader that is dead"
    c.broadcast("forked-leader/2", b"" if c.rank == 0 else None, TIMEOUT_S)
    part_without(c, (LEADER,), "forked-leader/3")


OF_NODES: dict[str, Callable[[Coordinator], None]] = {
    **{scenario.__name__: scenario for scenario in (stopped_leader, killed_leader, forked_leader)},
    **{f"killed_at_{point}": functools.partial(killed_at, point=point) for point in NODE_POINTS},
}
DYING = {name: LEADER for name in OF_NODES if name != "stopped_leader"}  # and the rank that does
