"""The ranks of a node that make one message together: what becomes of an answer and of a word where one of them fails."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from support import assert_no_leak, patience, resources, wait_until
from test_coordinator import close_together, exchange_together, make_together, without_ranks

from ckpt.coordinator import leader, member
from ckpt.coordinator.answers import frames, join_answers, pack_answers, whole_messages
from ckpt.coordinator.base import silent_error, unposted_error
from ckpt.coordinator.leader import LeaderWay
from ckpt.coordinator.member import MemberWay, greet
from ckpt.coordinator.shared_directory import FOLDER, FileCoordinator
from ckpt.coordinator.store_connections import PREFIX
from ckpt.coordinator.torch_store import StoreCoordinator
from ckpt.coordinator.waiting import Deadline, Interrupt, InterruptibleDeadline, PostDeadline
from ckpt.coordinator.ways import AloneWay
from ckpt.coordinator.wire import address_of, listen_at
from ckpt.errors import ClosedError, PeerError, StorageError

TIMEOUT_S = patience(10.0)
FULL = StorageError(errno.ENOSPC, "the disk is full")


class Network:
    """What a rank has of it: notes what is sent, and has words. `failures` are raised by the next sends, one each."""

    def __init__(self, rank: int, words: dict[str, bytes]) -> None:
        self.rank = rank
        self.sent: list[tuple[str, dict[int, bytes]]] = []
        self.failures: list[Exception] = []
        self.listened: list[str] = []
        self.interrupt = Interrupt()
        self._words = words

    def send(self, key: str, answers: Mapping[int, bytes], deadline: Deadline) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append((key, dict(answers)))

    def listen(self, key: str, deadline: Deadline) -> bytes:
        self.listened.append(key)
        while key not in self._words:
            deadline.check()
            if deadline.over:
                raise silent_error(key, self.rank, deadline.timeout_s)
            deadline.sleep(0.01)
        return self._words[key]

    def wait_deadline(self, key: str, timeout_s: float) -> Deadline:
        return InterruptibleDeadline(timeout_s, self.interrupt, key)

    def post_deadline(self, timeout_s: float) -> Deadline:
        return PostDeadline(timeout_s, self.interrupt)


@pytest.fixture(scope="module")
def leaks_nothing() -> Iterator[None]:
    """One look behind all tests: it takes longer than most of them."""
    before = resources()
    yield
    assert_no_leak(before)


class Node:
    """A leader, rank 2, and its members, ranks 3 and 4, in this process; rank 0 is elsewhere."""

    def __init__(self) -> None:
        self.words: dict[str, bytes] = {}
        self.networks = {rank: Network(rank, self.words) for rank in (2, 3, 4)}
        address = f"\0lazyckpt-test-{os.getpid()}-{time.monotonic_ns()}"
        listener = listen_at(address)
        assert listener is not None and listen_at(address) is None, "one leads"
        self.leader = LeaderWay(self.networks[2], listener)
        self.members = {rank: MemberWay(self.networks[rank], address, greet(address, rank)) for rank in (3, 4)}
        self.ways: dict[int, LeaderWay | MemberWay] = {2: self.leader, **self.members}

    def together(self, call: Callable[[int], Any]) -> dict[int, Any]:
        """What the call returns or raises on each rank, all at once."""

        def one(rank: int) -> Any:
            try:
                return call(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(3) as pool:
            return dict(zip(self.ways, pool.map(one, self.ways), strict=True))

    def post(self, key: str) -> dict[int, Any]:
        return self.together(lambda rank: self.ways[rank].post(key, b"%d" % rank, TIMEOUT_S))

    def hear(self, key: str) -> dict[int, Any]:
        return self.together(lambda rank: self.ways[rank].hear(key, TIMEOUT_S))

    def held(self, key: str) -> set[int]:
        """Whose answers the leader has, and has not sent."""
        batch = self.leader._batches.get(key)
        return set() if batch is None else {*batch.answers}

    def end(self, rank: int) -> None:
        self.networks[rank].interrupt.say()
        self.ways[rank].close()


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, leaks_nothing: Any) -> Iterator[Node]:
    monkeypatch.setattr(leader, "HOLD_S", TIMEOUT_S)  # however slow this machine is just now
    monkeypatch.setattr(leader, "_HOLD_SHARE", 1)
    made = Node()
    yield made
    for rank in (3, 4, 2):
        made.end(rank)


EVERYBODY = {rank: b"%d" % rank for rank in (2, 3, 4)}
NONE = dict.fromkeys((2, 3, 4))


def test_one_message_and_one_listener(node: Node) -> None:
    for number in range(3):
        key = f"a/{number}"
        assert node.post(key) == NONE
        node.words[key] = b"word"
        assert node.hear(key) == dict.fromkeys((2, 3, 4), b"word")
    assert node.networks[2].sent == [(f"a/{number}", EVERYBODY) for number in range(3)]
    assert node.networks[2].listened == [f"a/{number}" for number in range(3)]
    assert not any(node.networks[rank].sent or node.networks[rank].listened for rank in (3, 4))
    assert not node.leader._words and not node.leader._batches, "nothing is kept"


def test_who_is_late_is_not_waited_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "HOLD_S", 0.05)
    node.members[3].post("a/1", b"3", TIMEOUT_S)
    assert node.networks[2].sent == [("a/1", {3: b"3"})]
    node.leader.post("a/1", b"2", TIMEOUT_S)
    node.members[4].post("a/1", b"4", TIMEOUT_S)
    assert node.networks[2].sent == [("a/1", {3: b"3"}), ("a/1", {2: b"2"}), ("a/1", {4: b"4"})]


def test_the_last_of_a_node_goes_at_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for nobody who has answered before."""
    monkeypatch.setattr(leader, "HOLD_S", 0.05)
    for rank in (3, 4):
        node.members[rank].post("a/1", b"%d" % rank, TIMEOUT_S)
    monkeypatch.setattr(leader, "HOLD_S", 600.0)
    node.leader.post("a/1", b"2", TIMEOUT_S)
    assert node.networks[2].sent == [("a/1", {rank: b"%d" % rank}) for rank in (3, 4, 2)]
    assert not node.leader._passed, "all have answered"


def test_several_streams_at_once(node: Node) -> None:
    streams = [f"{name}/1" for name in "abcd"]
    for key in streams:
        node.words[key] = key.encode()

    def work(rank: int) -> list[bytes]:
        def one(key: str) -> bytes:
            node.ways[rank].post(key, b"%d" % rank, TIMEOUT_S)
            return node.ways[rank].hear(key, TIMEOUT_S)

        with ThreadPoolExecutor(4) as pool:
            return [*pool.map(one, streams)]

    assert node.together(work) == {rank: [key.encode() for key in streams] for rank in (2, 3, 4)}
    assert sorted(node.networks[2].sent) == [(key, EVERYBODY) for key in streams]


@pytest.mark.parametrize("last", [2, 3])
def test_a_message_that_the_leader_cannot_send(node: Node, last: int) -> None:
    """Everybody tries alone, and so does the leader if it is its thread that failed: there may be room for its own answer."""
    node.networks[2].failures = [FULL]
    with ThreadPoolExecutor(2) as pool:
        first = {rank: pool.submit(node.ways[rank].post, "a/1", b"%d" % rank, TIMEOUT_S) for rank in {2, 3, 4} - {last}}
        wait_until(lambda: node.held("a/1") == first.keys(), TIMEOUT_S, "the answers of the others")
        node.ways[last].post("a/1", b"%d" % last, TIMEOUT_S)
        assert [post.result(TIMEOUT_S) for post in first.values()] == [None, None]
    assert all(network.sent == [("a/1", {rank: b"%d" % rank})] for rank, network in node.networks.items())


@pytest.mark.parametrize(("of_leader", "raised"), [(FULL, StorageError), (unposted_error("a/1", 2, "who knows"), PeerError)])
def test_a_storage_error_means_that_rank_0_has_nothing(node: Node, of_leader: Exception, raised: type[Exception]) -> None:
    """So a rank does not say it where the leader's attempt may have got through."""
    node.networks[2].failures = [of_leader] * 2
    for rank in (3, 4):
        node.networks[rank].failures = [FULL]
    ended = node.post("a/1")
    assert [type(ended[rank]) for rank in (3, 4)] == [raised] * 2
    assert isinstance(ended[2], type(of_leader))


def test_a_leader_that_ends_while_others_wait(node: Node) -> None:
    """They go on alone: with what they post, and with what they wait for."""
    with ThreadPoolExecutor(2) as pool:
        post = pool.submit(node.members[3].post, "a/1", b"3", TIMEOUT_S)
        word = pool.submit(node.members[4].hear, "b/1", TIMEOUT_S)
        wait_until(lambda: "b/1" in node.networks[2].listened and node.held("a/1"), TIMEOUT_S, "both requests")
        node.end(2)
        post.result(TIMEOUT_S)
        wait_until(lambda: "b/1" in node.networks[4].listened, TIMEOUT_S, "rank 4 to listen itself")
        node.words["b/1"] = b"word"
        assert word.result(TIMEOUT_S) == b"word"
    sent = [sent for network in node.networks.values() for sent in network.sent]
    assert sent and all(each == ("a/1", {3: b"3"}) for each in sent), "what is posted goes out, twice perhaps"
    node.members[3].post("a/2", b"3", TIMEOUT_S)
    assert node.networks[3].sent[-1] == ("a/2", {3: b"3"})


def test_a_member_that_ends_is_not_waited_for(node: Node) -> None:
    with ThreadPoolExecutor(2) as pool:
        posts = [pool.submit(node.ways[rank].post, "a/1", b"%d" % rank, TIMEOUT_S) for rank in (2, 3)]
        wait_until(lambda: node.held("a/1") == {2, 3}, TIMEOUT_S, "both answers")
        assert node.networks[2].sent == []
        node.end(4)
        for post in posts:
            post.result(TIMEOUT_S)
    assert node.networks[2].sent == [("a/1", {2: b"2", 3: b"3"})]


@pytest.mark.parametrize("rank", [2, 3])
def test_an_interrupt_ends_a_wait(node: Node, rank: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        waits = {each: pool.submit(node.ways[each].hear, "a/1", TIMEOUT_S) for each in (2, 3)}
        wait_until(lambda: "a/1" in node.networks[2].listened, TIMEOUT_S, "the waits")
        time.sleep(0.1)
        node.networks[rank].interrupt.say()
        node.ways[rank].interrupt()
        with pytest.raises(ClosedError):
            waits[rank].result(TIMEOUT_S)
        node.words["a/1"] = b"word"
        assert waits[5 - rank].result(TIMEOUT_S) == b"word", "the other is not disturbed"


def test_a_leader_that_hangs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes from it, not even a pulse: its member goes alone, and does not ask again at once."""
    monkeypatch.setattr(member, "SILENCE_S", 0.2)
    monkeypatch.setattr(member, "_LEAST_SILENCE_S", 0.2)
    monkeypatch.setattr(leader.Wire, "pulse", lambda _: None)
    node.members[3].post("a/1", b"3", TIMEOUT_S)  # the leader holds it: the others have not answered
    assert node.networks[3].sent == [("a/1", {3: b"3"})]
    node.words["a/1"] = b"word"
    assert node.members[3].hear("a/1", TIMEOUT_S) == b"word" and node.networks[3].listened == ["a/1"]


def test_a_pulse_keeps_a_member_waiting(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as it likes."""
    monkeypatch.setattr(member, "SILENCE_S", 1.5)
    with ThreadPoolExecutor(1) as pool:
        word = pool.submit(node.members[3].hear, "a/1", TIMEOUT_S * 10)
        time.sleep(2.5)
        assert node.networks[3].listened == []
        node.words["a/1"] = b"word"
        assert word.result(TIMEOUT_S) == b"word"


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """For this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_member_without_descriptors_goes_alone(node: Node) -> None:
    with ThreadPoolExecutor(1) as pool:
        word = pool.submit(node.members[3].hear, "b/1", TIMEOUT_S)
        wait_until(lambda: "b/1" in node.networks[2].listened, TIMEOUT_S, "its connection to be in use")
        try:
            with no_more_descriptors():
                node.members[3].post("a/1", b"3", TIMEOUT_S)
                assert listen_at("\0lazyckpt-test") is None
        finally:
            node.words["b/1"] = b"word"
        assert word.result(TIMEOUT_S) == b"word"
    assert node.networks[3].sent == [("a/1", {3: b"3"})]


def test_a_leader_without_descriptors_says_it_once(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [OSError(errno.EMFILE, "no more descriptors")] * 3
    accept = socket.socket.accept
    monkeypatch.setattr(leader, "PULSE_S", 0.01)
    monkeypatch.setattr(socket.socket, "accept", lambda listener: raise_(failures.pop()) if failures else accept(listener))
    wait_until(lambda: not failures, TIMEOUT_S, "the failures")
    wire = greet(node.members[3]._address, 3, TIMEOUT_S)
    assert wire is not None, "it goes on"
    wire.close()
    assert caplog.text.count("could not take a connection") == 1


def raise_(error: BaseException) -> Any:
    raise error


def test_an_interrupted_leader_holds_up_nobody(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, wherever it comes: behind its claim of a message, or of listening, it has to give that up."""

    class Sought(set[str]):
        def add(self, key: str) -> None:
            super().add(key)
            raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool:
        posts = [pool.submit(node.members[rank].post, "a/1", b"%d" % rank, TIMEOUT_S * 3) for rank in (3, 4)]
        wait_until(lambda: node.held("a/1") == {3, 4}, TIMEOUT_S, "both answers")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(node.leader, "_note_passed", lambda *_: raise_(KeyboardInterrupt()))
            node.leader.post("a/1", b"2", TIMEOUT_S)
        for post in posts:
            post.result(TIMEOUT_S)
    assert [node.networks[rank].sent for rank in (3, 4)] == [[("a/1", {rank: b"%d" % rank})] for rank in (3, 4)]
    node.leader._sought = Sought()
    with pytest.raises(KeyboardInterrupt):
        node.leader.hear("a/1", TIMEOUT_S)
    node.leader._sought = set(node.leader._sought)
    node.words["a/1"] = b"word"
    assert node.members[3].hear("a/1", TIMEOUT_S) == b"word" and node.networks[3].listened == [], "it has it from the leader"


def test_an_interrupted_member_is_not_counted_on(node: Node) -> None:
    """Its connection ends: the reply to what was interrupted must not be taken for another one."""
    (wire,) = node.members[3]._idle
    wire.receive = lambda *_: raise_(KeyboardInterrupt())  # type: ignore[method-assign]
    node.words["a/1"] = b"word"
    with pytest.raises(KeyboardInterrupt):
        node.members[3].hear("a/1", TIMEOUT_S)
    wait_until(lambda: 3 not in node.leader._members.values(), TIMEOUT_S, "the leader to notice")
    assert not node.members[3]._in_use
    assert node.members[3].hear("a/1", TIMEOUT_S) == b"word" and node.networks[3].listened == [], "by a new connection"


def test_words_that_nobody_asks_for_are_not_kept_for_ever(node: Node) -> None:
    for number in range(50):
        node.words[f"a/{number}"] = b"word"
        assert node.leader.hear(f"a/{number}", TIMEOUT_S) == b"word"
    assert len(node.leader._words) < 10
    assert node.members[3].hear("a/0", TIMEOUT_S) == b"word", "it is fetched again"


# ---- messages --------------------------------------------------------------------------------------------------------


def test_answers_and_frames() -> None:
    one, two = {3: b"three", 4: b""}, {3: b"three", 7: bytes(9 << 20)}
    first, second = frames(1, pack_answers(one)), frames(2, pack_answers(two))
    assert len(second) == 3, "a value of the store takes so much at most"
    box = second[0] + first[0] + second[1] + second[2]
    assert join_answers(whole_messages(box)) == one | two
    assert join_answers(whole_messages(box[: -len(second[2])])) == one, "half a message is none"
    assert join_answers([]) == {}


# ---- which ranks share a node -----------------------------------------------------------------------------------------


def test_what_is_a_node() -> None:
    of_first = address_of("s", {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3", "GROUP_RANK": "0"})
    assert of_first == address_of("s", {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0", "GROUP_RANK": "0"})
    assert of_first != address_of("s", {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"})
    assert of_first != address_of("t", {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0", "GROUP_RANK": "0"}), "another session"
    assert address_of("s", {"SLURM_NODEID": "1"}) == address_of("s", {"GROUP_RANK": "1"})
    assert address_of("s", {}) is not None, "the machine"
    assert address_of("s", {"LOCAL_WORLD_SIZE": "1"}) is None, "nobody to speak for"


@pytest.mark.parametrize(
    ("variables", "leads"),
    [
        ([{}] * 4, [True, False, False, False]),
        ([{"LOCAL_RANK": "0"}] * 4, [True, False, False, False]),
        ([{"LOCAL_RANK": "5"}] * 4, [True, False, False, False]),
        (
            [{"GROUP_RANK": "0"}] * 2 + [{"GROUP_RANK": "1", "LOCAL_RANK": str(rank)} for rank in (1, 0)],
            [True, False, False, True],
        ),
        ([{"LOCAL_WORLD_SIZE": "1"}] * 4, [False] * 4),
    ],
)
def test_who_leads(
    variables: list[dict[str, str]], leads: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaks_nothing: Any
) -> None:
    """Whatever launchers say, right or wrong: one rank of each node, or none and all go alone."""
    own = threading.local()
    monkeypatch.setattr("ckpt.coordinator.grouped.address_of", lambda session: address_of(session, own.variables))
    monkeypatch.setattr("ckpt.coordinator.grouped.os", type("Os", (), {"environ": property(lambda _: own.variables)})())

    def make(rank: int) -> FileCoordinator:
        own.variables = variables[rank]
        return FileCoordinator(tmp_path, rank, 4, timeout_s=TIMEOUT_S)

    made = make_together([lambda rank=rank: make(rank) for rank in range(4)])
    ways = [coordinator._way for coordinator in made]  # type: ignore[attr-defined]
    assert [isinstance(way, LeaderWay) for way in ways] == leads
    assert all(
        isinstance(way, MemberWay if any(leads) else AloneWay) for way, leading in zip(ways, leads, strict=True) if not leading
    )
    for number in range(3):
        assert exchange_together(made, f"a/{number}", TIMEOUT_S) == [[b"0", b"1", b"2", b"3"]] * 4
    close_together(made)


def test_a_node_of_which_only_some_ranks_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process group; none of those on the second node has the local rank 0. One of them takes the place."""
    own = threading.local()
    monkeypatch.setattr("ckpt.coordinator.grouped.address_of", lambda session: address_of(session, own.variables))
    monkeypatch.setattr("ckpt.coordinator.grouped.os", type("Os", (), {"environ": property(lambda _: own.variables)})())

    def make(rank: int) -> FileCoordinator:
        own.variables = {"LOCAL_RANK": str(rank + 1), "GROUP_RANK": str(rank // 2)}
        return FileCoordinator(tmp_path, rank, 4, timeout_s=TIMEOUT_S)

    made = make_together([lambda rank=rank: make(rank) for rank in range(4)])
    kinds = [type(coordinator._way) for coordinator in made]  # type: ignore[attr-defined]
    assert kinds[:2] == [LeaderWay, MemberWay] and {*kinds[2:]} == {LeaderWay, MemberWay}
    assert exchange_together(made, "a/1", TIMEOUT_S) == [[b"0", b"1", b"2", b"3"]] * 4
    close_together(made)


# ---- ranks of other versions ------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - without_ranks().keys():
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_launcher")
def test_a_rank_of_another_version_is_named(tmp_path: Path) -> None:
    """It speaks otherwise, so nothing that it says is taken for anything else."""
    hello = tmp_path / FOLDER / "hello"
    hello.mkdir(parents=True)
    (hello / "1").write_bytes(b"0123456789abcdef")
    with pytest.raises(PeerError, match=r"rank 1 did not answer .* another version of lazyckpt") as caught:
        FileCoordinator(tmp_path, 0, 2, timeout_s=0.3)
    assert caught.value.ranks == (1,)
    store = torch.distributed.HashStore()
    torch.distributed.PrefixStore(PREFIX, store).set("greeting", b"\1\0\0\0" + bytes(12))
    with pytest.raises(PeerError, match=r"rank 1 did not answer .* another version of lazyckpt") as caught:
        StoreCoordinator(store, 0, 2, timeout_s=0.3)
    assert caught.value.ranks == (1,)
