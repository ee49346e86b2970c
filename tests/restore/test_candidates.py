"""The vote on a candidate, on two ranks: however it ends on one, the other hears of it at once."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import patience
from test_rounds import Rank

from ckpt.errors import InUseError, PeerError, StorageError
from ckpt.restore.candidates import Candidate, CandidateVote, Objection, Seen, Verify

LONG_S = 600.0  # a rank that waits so long has heard nothing
CANDIDATES = [Candidate("newest", 3, False), Candidate("older", 2, False)]


def good(candidate: Candidate) -> Objection | None:
    return None


def raising(error: Exception) -> Verify:
    def verify(candidate: Candidate) -> Objection | None:
        raise error

    return verify


def vote(
    lead: Verify, follow: Verify, find: Callable[[], Seen] = lambda: Seen(CANDIDATES), gone: int | None = None
) -> list[Any]:
    """What each rank returns or raises. `gone`: the rank that never calls."""
    up: queue.Queue[bytes] = queue.Queue()
    down: queue.Queue[bytes] = queue.Queue()
    votes = [CandidateVote(Rank(0, up, down), "vote", LONG_S), CandidateVote(Rank(1, down, up), "vote", LONG_S)]
    if gone is not None:
        votes[1 - gone]._coordinator.hear = lambda timeout_s: (_ for _ in ()).throw(PeerError("it is gone", (gone,)))  # type: ignore[attr-defined]

    def one(rank: int) -> Any:
        votes[rank].begin()
        try:
            return votes[0].lead(find, lead)[0] if rank == 0 else votes[1].follow(follow)[0]
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        ended = [pool.submit(one, rank) for rank in (0, 1) if rank != gone]
        return [each.result(patience(30)) for each in ended]


def test_a_candidate_that_is_good_on_both() -> None:
    assert vote(good, good) == [CANDIDATES[0], CANDIDATES[0]]


def test_one_that_is_bad_on_one() -> None:
    def only_older(candidate: Candidate) -> Objection | None:
        return Objection("a byte differs") if candidate.name == "newest" else None

    assert vote(only_older, good) == [CANDIDATES[1]] * 2 == vote(good, only_older)


MORE = [*CANDIDATES, Candidate("oldest", 1, False)]


@pytest.mark.parametrize("oldest_is_good", [True, False])
def test_one_that_is_damaged_as_the_one_before_is_tried_last(oldest_is_good: bool) -> None:
    """Whichever rank says so. It may be good for what these ranks want of it."""
    asked: list[tuple[str, bool]] = []

    def lead(candidate: Candidate) -> Objection | None:
        asked.append((candidate.name, candidate.known_only))
        bad = candidate.name == "newest" or (candidate.name == "oldest" and not (oldest_is_good or candidate.known_only))
        return Objection("a byte differs") if bad else None

    def follow(candidate: Candidate) -> Objection | None:
        return Objection("the same byte") if candidate.known_only and candidate.name == "older" else None

    found = MORE[2] if oldest_is_good else MORE[1]
    assert vote(lead, follow, lambda: Seen(MORE)) == [found, found]
    first = [("newest", False), ("older", True), ("oldest", True), ("oldest", False)]
    assert asked == (first if oldest_is_good else [*first, ("older", False)])


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("what merge= has raised")], ids=repr)
def test_a_rank_that_cannot_go_on(error: Exception) -> None:
    """Not because of the candidate: to try another would not help."""
    ours, theirs = vote(good, raising(error))
    assert theirs is error
    assert isinstance(ours, PeerError) and ours.ranks == (1,)
    assert "rank 1" in str(ours) and type(error).__name__ in str(ours) and str(error) in str(ours)


def test_rank_0_that_cannot_go_on() -> None:
    error = MemoryError("no room")
    ours, theirs = vote(raising(error), good)
    assert ours is error
    assert isinstance(theirs, PeerError) and theirs.ranks == (0,) and "rank 0: MemoryError: no room" in str(theirs)


def test_both_for_reasons_of_their_own() -> None:
    errors = [MemoryError("here"), ValueError("there")]
    assert vote(raising(errors[0]), raising(errors[1])) == errors


def test_a_directory_that_cannot_be_listed() -> None:
    error = StorageError(5, "cannot list it")

    def find() -> Seen:
        raise error

    ours, theirs = vote(good, good, find)
    assert ours is error
    assert isinstance(theirs, PeerError) and theirs.ranks == (0,) and "cannot list it" in str(theirs)


def test_a_rank_that_dies() -> None:
    """Rank 0 hears of it, and tells the others: here nobody is left to hear it."""
    (ours,) = vote(good, good, gone=1)
    assert isinstance(ours, PeerError) and ours.ranks == (1,)


def test_the_others_hear_that_a_rank_has_died() -> None:
    """Three ranks, of which the last one answers nothing: the second one hears so from rank 0."""
    up: queue.Queue[bytes] = queue.Queue()
    down: queue.Queue[bytes] = queue.Queue()

    class Leading(Rank):
        def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
            self.hear(timeout_s)
            raise PeerError("rank 2 has not answered", (2,))

    first, second = CandidateVote(Leading(0, up, down), "vote", LONG_S), CandidateVote(Rank(1, down, up), "vote", LONG_S)
    with ThreadPoolExecutor(2) as pool:
        first.begin(), second.begin()
        began = time.monotonic()
        leading = pool.submit(first.lead, lambda: Seen(CANDIDATES), good)
        following = pool.submit(second.follow, good)
        for each in (leading, following):
            error = each.exception(patience(30))
            assert isinstance(error, PeerError) and error.ranks == (2,) and "rank 2 has not answered" in str(error)
    assert time.monotonic() - began < LONG_S


def test_ranks_that_have_lost_each_other_say_nothing_more() -> None:
    """A collective has failed on both: there may be nobody to talk to."""
    lost = PeerError("the connection was reset")
    assert vote(raising(lost), raising(lost)) == [lost, lost]


def test_a_second_job() -> None:
    up: queue.Queue[bytes] = queue.Queue()
    down: queue.Queue[bytes] = queue.Queue()
    first, second = CandidateVote(Rank(0, up, down), "vote", LONG_S), CandidateVote(Rank(1, down, up), "vote", LONG_S)
    first.begin(), second.begin()
    first.refuse("another job saves here")
    with pytest.raises(InUseError, match="another job saves here"):
        second.follow(good)
