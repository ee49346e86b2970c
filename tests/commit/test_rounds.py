"""The round of a commit: what rank 0 and another rank make of each way in which it can end."""

from __future__ import annotations

import errno
import json
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import patience

from ckpt.commit.conversation import Failure, RankConversation, answer_for
from ckpt.commit.rounds import Answers, Round, Verdict
from ckpt.coordinator import Coordinator
from ckpt.errors import CheckpointError, PeerError, SkippedError, StorageError

SILENCE_S = 0.2


class Rank(Coordinator):
    """Of two; what it says goes straight to the other."""

    name, world_size = "test", 2

    def __init__(self, rank: int, inbox: queue.Queue[bytes], outbox: queue.Queue[bytes]) -> None:
        self.rank = rank
        self.inbox, self.outbox = inbox, outbox
        self.fails: BaseException | None = None  # whatever it sends

    def hear(self, timeout_s: float) -> bytes:
        try:
            return self.inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerError("nothing came", (1 - self.rank,)) from None

    def say(self, payload: bytes) -> None:
        if self.fails is not None:
            raise self.fails
        self.outbox.put(payload)

    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
        if self.rank == 0:
            return [payload, self.hear(timeout_s)]
        self.say(payload)
        return None

    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        if payload is None or self.rank != 0:
            return self.hear(timeout_s)
        self.say(payload)
        return payload

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


class Pair:
    """Holds one round on two ranks. `undone` has what each was told of the files that it took back."""

    def __init__(self) -> None:
        up: queue.Queue[bytes] = queue.Queue()
        down: queue.Queue[bytes] = queue.Queue()
        self.ranks = [Rank(0, up, down), Rank(1, down, up)]
        self.timeout_s = patience(30)
        self.undone: list[list[bool]] = [[], []]
        self.acted = False

    def hold(
        self,
        errors: tuple[BaseException | None, BaseException | None] = (None, None),
        act: Callable[[Round], Verdict] = lambda _: Verdict(more={"said": 1}),
        decided: bool = False,
    ) -> list[Any]:
        def one(rank: int) -> Any:
            round_ = Round(
                RankConversation(self.ranks[rank], "rounds", self.timeout_s),
                "7-first",
                "step 7",
                undo=None if decided else self.undone[rank].append,
                reply=lambda question: f"{question['word']} of rank {rank}",
            )

            def note_and_act(answers: Answers) -> Verdict:
                self.acted = True
                assert [answer["what"] for answer in answers] == ["seven", "seven"]
                return act(round_)

            try:
                return round_.hold(answer_for("seven", errors[rank]), errors[rank], note_and_act)
            except CheckpointError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))


def test_all_are_told_what_rank_0_has_done() -> None:
    pair = Pair()
    told = pair.hold()
    assert all(isinstance(said, Mapping) and said["said"] == 1 for said in told), told
    assert pair.undone == [[], []]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_fails_raises_its_own_error_and_the_other_hears_of_it(victim: int) -> None:
    pair, own = Pair(), StorageError(errno.EIO, "the disk is gone", "")
    told = pair.hold(errors=(own, None) if victim == 0 else (None, own))
    assert told[victim] is own and not pair.acted
    other = told[1 - victim]
    assert isinstance(other, PeerError) and other.ranks == (victim,) and "given up by all ranks" in str(other)
    assert pair.undone == [[True], [True]]


def test_a_save_that_was_only_skipped_is_no_failure_of_a_rank() -> None:
    pair = Pair()
    told = pair.hold(errors=(None, SkippedError("busy")))
    assert [type(said) for said in told] == [SkippedError, SkippedError] and pair.undone == [[True], [True]]


@pytest.mark.parametrize("own", [None, CheckpointError("cannot be pickled")])
def test_a_rank_whose_answer_is_not_delivered_takes_its_files_back_alone(own: BaseException | None) -> None:
    pair = Pair()
    pair.timeout_s = SILENCE_S
    undelivered = pair.ranks[1].fails = StorageError(errno.ENOSPC, "full", "")
    told = pair.hold(errors=(None, own))
    assert told[1] is (own or undelivered), "what has failed first"
    assert isinstance(told[0], PeerError) and told[0].ranks == (1,) and not pair.acted
    assert pair.undone == [[True], [False]]


def test_a_rank_whose_answer_may_have_been_delivered_leaves_its_files_alone() -> None:
    pair = Pair()
    pair.timeout_s = SILENCE_S
    lost = pair.ranks[1].fails = PeerError("it may have come", (0,))
    told = pair.hold()
    assert told[1] is lost and pair.undone[1] == []


def test_a_rank_that_hears_no_verdict_leaves_its_files_alone() -> None:
    pair = Pair()
    pair.timeout_s = SILENCE_S
    pair.ranks[0].fails = PeerError("nobody listens")
    told = pair.hold()
    assert isinstance(told[0], Mapping), "what is published is published"
    assert isinstance(told[1], PeerError) and pair.undone == [[], []]


@pytest.mark.parametrize("stands", [False, True])
def test_what_rank_0_could_not_do(stands: bool) -> None:
    pair, own = Pair(), CheckpointError("no")
    told = pair.hold(act=lambda _: Verdict(Failure("rank 0 could not", (0,), stands=stands), own))
    assert told[0] is own and isinstance(told[1], PeerError)
    assert ("was given up by all ranks" in str(told[1])) is not stands
    assert pair.undone == ([[], []] if stands else [[True], [True]])


def test_after_the_decision_every_failure_stands() -> None:
    pair = Pair()
    told = pair.hold(errors=(CheckpointError("late"), None), decided=True)
    assert isinstance(told[1], PeerError) and "went wrong" in str(told[1]) and "given up" not in str(told[1])


def test_rank_0_asks_while_it_acts() -> None:
    pair = Pair()
    heard: list[str] = []

    def act(round_: Round) -> Verdict:
        heard.extend(round_.ask({"word": "differs"}))
        return Verdict(Failure("they differ", (1,)))

    told = pair.hold(act=act)
    assert heard == ["", "differs of rank 1"]
    assert all(isinstance(said, PeerError) and "they differ" in str(said) for said in told), told


# ---- what rank 0 does not understand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"{", b"{},{}", b'"a', b"\xff", b"7", b"[]", b"null", b'{"what": "step 1"}'])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_answer_that_is_none_fails_the_save(payload: bytes, rank: int) -> None:
    """And does not shift those of others."""
    own = answer_for("step 1", None)
    good = json.dumps(own).encode()

    class Said(Rank):
        def gather(self, key: str, _: bytes, timeout_s: float) -> list[bytes] | None:
            return [payload, good] if rank == 0 else [good, payload]

    failure, answers = RankConversation(Said(0, queue.Queue(), queue.Queue()), "stream", 1.0).collect("key", own)
    assert failure is not None and "did not understand the others" in failure.text and answers == []


def test_answers_are_those_of_their_ranks() -> None:
    class Said(Rank):
        world_size = 3

        def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
            return [payload, *(json.dumps({**json.loads(payload), "rank": rank}).encode() for rank in (1, 2))]

    own = answer_for("step 1", None) | {"rank": 0}
    failure, answers = RankConversation(Said(0, queue.Queue(), queue.Queue()), "stream", 1.0).collect("key", own)
    assert failure is None and [answer["rank"] for answer in answers] == [0, 1, 2]
