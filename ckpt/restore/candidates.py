"""How ranks choose a checkpoint: rank 0 names candidates, one after the other, and the first that is good on all is taken.

A living job may save into the directory meanwhile, and remove what is old. A candidate that goes while it is looked at is not
damaged: rank 0 looks again, and the newest of what is there now comes next.
"""

from __future__ import annotations

import collections
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ckpt.coordinator import Coordinator
from ckpt.errors import CheckpointError, InUseError, PeerError

logger = logging.getLogger("ckpt")

_MOST_LOOKS = 100
_LOOKS_AT_ONE = 3  # that is gone for one rank, and still there for rank 0: a network file system tells both late
_SHOWN = 8  # ranks or candidates that a message names
_PAUSE_S = 0.1  # before the same candidate is looked at again

DAMAGED, LOST, GONE = "damaged", "lost", "gone"


class Candidate(NamedTuple):
    """A directory name, the sequence number of its manifest, and how it is read.

    Attributes:
        collective: whether the ranks read a file of it together.
        nearest: whether each rank reads what its node has, and of other nodes what that lacks; else all read what is at home.
        identity: of its manifest, see there; empty: its sequence tells enough.
        holders: numbers of the nodes on which files of it lie.
        remote: its folder in an object store; empty: it is in none.
        known_only: it is only asked for damage that those before it have shown, see known_damage.py.
    """

    name: str
    sequence: int
    collective: bool = False
    nearest: bool = False
    identity: str = ""
    holders: tuple[int, ...] = ()
    remote: str = ""
    known_only: bool = False

    @property
    def where(self) -> str:
        """For messages, behind its name."""
        if self.remote:
            return " in all places where it lies"
        return " as it lies on the nodes" if self.nearest else ""


class Seen(NamedTuple):
    """What rank 0 finds in the directory.

    Attributes:
        candidates: in the order in which they are to be tried.
        rejected: what is wrong with those that are no candidates.
        lost: what to say if there is neither, although the directory is not empty.
    """

    candidates: Sequence[Candidate]
    rejected: Sequence[str] = ()
    lost: str = ""


class Objection(NamedTuple):
    """What is wrong on this rank.

    Attributes:
        gone: the candidate was removed or replaced while it was looked at.
        fatal: not with the candidate: this rank cannot go on, so the restore ends on all ranks.
    """

    cause: str
    gone: bool = False
    fatal: bool = False


class Refusal(NamedTuple):
    """Why there is nothing to take: the causes, and their kind: DAMAGED, LOST or GONE. No causes: nothing is there."""

    causes: Sequence[str] = ()
    kind: str = DAMAGED


# Looks at a candidate on this rank; says what is wrong with it, or None. All ranks call it for the same candidates, in the same
# order, so it may make collectives.
Verify = Callable[[Candidate], "Objection | None"]
Choice = tuple["Candidate | None", Refusal]


class CandidateVote:
    """
    Args:
        stream: of the keys; no other conversation of this job uses it.
        timeout_s: how long to wait for the slowest rank, seconds; verifying a candidate must fit into it.
    """

    def __init__(self, coordinator: Coordinator, stream: str, timeout_s: float) -> None:
        self._coordinator = coordinator
        self._stream = stream
        self._timeout_s = timeout_s
        self._calls = 0
        self._asked = 0
        self.rejected: set[int] = set()  # on rank 0: sequences of those that were found bad on any rank

    def begin(self) -> None:
        """To be called first, on all ranks: however the last one ended, they ask the same questions again."""
        self._calls += 1
        self._asked = 0

    def meet(self) -> None:
        """Returns when all ranks have called it."""
        self._collect(None)
        if self._coordinator.rank == 0:
            self._tell({})
        else:
            self._hear()

    def refuse(self, text: str) -> None:
        """On rank 0, instead of leading: the others raise InUseError."""
        self._tell({"refusal": text})

    def lead(self, find_steps: Callable[[], Seen], verify: Verify) -> Choice:
        """On rank 0: the first candidate that is good everywhere; else None, and why.

        Args:
            find_steps: lists the checkpoints; called again when a candidate has gone.

        Raises:
            PeerError: another rank cannot go on, or does not answer. Or what went wrong here; the others are told.
        """
        rejected: dict[Candidate, str] = {}
        doubted: set[Candidate] = set()  # damaged as those before them: they are read as a whole if no other is good
        times_gone: collections.Counter[Candidate] = collections.Counter()
        end = time.monotonic() + self._timeout_s
        for _ in range(_MOST_LOOKS):
            seen = self._find(find_steps)
            left = [each for each in seen.candidates if each not in rejected]
            waiting = collections.deque(sorted(left, key=lambda each: each in doubted))
            while waiting:
                candidate = waiting.popleft()
                time.sleep(_PAUSE_S * times_gone[candidate])
                looks_first = bool(rejected) and candidate not in doubted
                objection = self._ask(candidate._replace(known_only=True), verify) if looks_first else None
                if objection is not None and not objection.gone:
                    doubted.add(candidate)
                    self.rejected.add(candidate.sequence)  # retention must not take it for good, whatever is read of it
                    waiting.append(candidate)
                    _tell_passed_over(candidate, f"{objection.cause}. It is read as a whole only if no other is good")
                    continue
                objection = objection or self._ask(candidate, verify)
                if objection is None:
                    self.rejected.discard(candidate.sequence)
                    return candidate, Refusal()
                if objection.gone and times_gone[candidate] < _LOOKS_AT_ONE:
                    times_gone[candidate] += 1
                    break
                rejected[candidate] = objection.cause
                self.rejected.add(candidate.sequence)
                _tell_passed_over(candidate, objection.cause)
            else:
                causes = {candidate.name: cause for candidate, cause in rejected.items()}
                return None, self._give_up([*seen.rejected, *_each_once(causes)], seen.lost)
            logger.info("checkpoint '%s' went while it was being read: looking again", candidate.name)
            if time.monotonic() > end:
                break
        return None, self._give_up([_outrun(candidate, len(seen.candidates), sum(times_gone.values()))], kind=GONE)

    def _find(self, find_steps: Callable[[], Seen]) -> Seen:
        try:
            return find_steps()
        except Exception as error:
            self._end(_fatal(error).cause, (0,))
            raise

    def _ask(self, candidate: Candidate, verify: Verify) -> Objection | None:
        self._tell(candidate._asdict())
        own, error = _try(verify, candidate)
        try:
            objection, fatal = self._collect(own)
        except PeerError as missing:
            self._end(str(missing), missing.ranks)
            raise error or missing from None
        if objection is not None and fatal:
            text = self._end(objection.cause, fatal)
            raise error or PeerError(text, fatal)
        self._tell({"good": objection is None})
        return objection

    def _end(self, cause: str, ranks: Sequence[int]) -> str:
        """Tells the others that there is no going on, and why."""
        text = f"the restore was given up by all ranks: {cause}"
        self._tell({"ended": text, "ranks": list(ranks)})
        return text

    def _give_up(self, causes: list[str], lost: str = "", kind: str = DAMAGED) -> Refusal:
        refusal = Refusal([lost], LOST) if lost and not causes else Refusal(causes + [lost] * bool(lost), kind)
        self._tell({"rejected": refusal.causes, "kind": refusal.kind})
        return refusal

    def follow(self, verify: Verify) -> Choice:
        """On the other ranks.

        Raises:
            InUseError: rank 0 has refused.
            PeerError: another rank cannot go on, or does not answer. Or what went wrong here; the others are told.
        """
        while True:
            said = self._hear_unless_ended()
            if "refusal" in said:
                raise InUseError(said["refusal"])
            if "rejected" in said:
                return None, Refusal(said["rejected"], said["kind"])
            candidate = Candidate(**{**said, "holders": tuple(said["holders"])})
            objection, error = _try(verify, candidate)
            self._collect(objection)
            if error is not None:
                raise error
            if self._hear_unless_ended()["good"] and objection is None and not candidate.known_only:
                return candidate, Refusal()

    def _hear_unless_ended(self) -> dict[str, Any]:
        said = self._hear()
        if "ended" in said:
            raise PeerError(said["ended"], said["ranks"])
        return said

    def _tell(self, message: dict[str, Any]) -> None:
        self._coordinator.broadcast(self._next_key(), json.dumps(message).encode(), self._timeout_s)

    def _hear(self) -> dict[str, Any]:
        return dict(json.loads(self._coordinator.broadcast(self._next_key(), None, self._timeout_s + 10)))

    def _collect(self, objection: Objection | None) -> tuple[Objection | None, list[int]]:
        """Rank 0 gets what is wrong on any rank, or on those that cannot go on, if there are such; and which these are."""
        own = b"" if objection is None else json.dumps(objection._asdict()).encode()
        answers = self._coordinator.gather(self._next_key(), own, self._timeout_s) or []
        found = {rank: Objection(**json.loads(answer)) for rank, answer in enumerate(answers) if answer}
        fatal = [rank for rank, each in found.items() if each.fatal]
        found = {rank: each for rank, each in found.items() if rank in fatal or not fatal}
        if not found:
            return None, []
        ranks: dict[str, list[int]] = {}
        for rank, each in found.items():
            ranks.setdefault(each.cause, []).append(rank)
        several = self._coordinator.world_size > 1
        causes = [f"{_name_ranks(those)}: {cause}" if several else cause for cause, those in ranks.items()]
        return Objection("; ".join(causes), any(each.gone for each in found.values())), fatal

    def _next_key(self) -> str:
        self._asked += 1
        return f"{self._stream}/{self._calls}-{self._asked}"


def _try(verify: Verify, candidate: Candidate) -> tuple[Objection | None, Exception | None]:
    """What is wrong, and what to raise once the others know.

    Raises:
        PeerError: the ranks have lost each other: there may be nobody to tell.
    """
    try:
        return verify(candidate), None
    except PeerError:
        raise
    except Exception as error:
        return _fatal(error), error


def _tell_passed_over(candidate: Candidate, cause: str) -> None:
    logger.warning("checkpoint '%s'%s is passed over: %s", candidate.name, candidate.where, cause)


def _fatal(error: Exception) -> Objection:
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    return Objection(text, fatal=True)


def _name_ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + ", ".join(map(str, ranks[:_SHOWN])) + f" and {len(ranks) - _SHOWN} more" * (len(ranks) > _SHOWN)


def _each_once(causes: Mapping[str, str]) -> list[str]:
    """What is wrong with candidates, by their names; what is the same but for the name is said of the first of them."""
    alike: dict[str, list[str]] = {}
    for name, cause in causes.items():
        alike.setdefault(cause.replace(name, ""), []).append(name)
    told = []
    for first, *others in alike.values():
        more = f" and {len(others) - _SHOWN} more" * (len(others) > _SHOWN)
        told.append(causes[first] + (f" (so it is with {', '.join(others[:_SHOWN])}{more})" if others else ""))
    return told


def _outrun(candidate: Candidate, there: int, times: int) -> str:
    return (
        f"'{candidate.name}' was removed or replaced while it was being read, and so were others, {times} times in all: the "
        f"job that saves here keeps only {there} checkpoints, and removes each before it can be read. Let that job keep "
        "more (keep=), or save less often"
    )
