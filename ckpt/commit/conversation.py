"""What two-phase commit says on the wire: every rank answers rank 0, which tells everybody the outcome.

An answer is a mapping with `what` (what the rank saves: it must be the same on all), `failure` (None, or what went wrong there)
and `skipped` (it is no failure but a save that was not wanted), and whatever else the phase needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from ckpt.collector import without_collector
from ckpt.coordinator import Coordinator
from ckpt.errors import CheckpointError, PeerError, SkippedError

logger = logging.getLogger("ckpt")


@dataclasses.dataclass(frozen=True)
class Failure:
    """`stands`: the manifest has its name all the same, so the files are a checkpoint's and stay."""

    text: str
    ranks: tuple[int, ...]
    skipped: bool = False
    stands: bool = False

    def to_error(self, what: str) -> CheckpointError:
        """What a rank raises that did nothing wrong itself."""
        outcome = "went wrong" if self.stands else "was given up by all ranks"
        text = f"the save of {what} {outcome}: {self.text}"
        return SkippedError(text) if self.skipped else PeerError(text, self.ranks)


class RankConversation:
    """
    Args:
        stream: of the keys; no other conversation of this job uses it.
        timeout_s: how long rank 0 waits for the slowest rank, seconds.
    """

    def __init__(self, coordinator: Coordinator, stream: str, timeout_s: float) -> None:
        self.rank = coordinator.rank
        self.world_size = coordinator.world_size
        self._coordinator = coordinator
        self._stream = stream
        self._timeout_s = timeout_s

    def collect(self, key: str, own: Mapping[str, Any]) -> tuple[Failure | None, list[dict[str, Any]]]:
        """On rank 0: the answers of all ranks, or why there is no going on. Raises nothing: the others wait for word."""
        missing: tuple[int, ...] = ()
        cause = ""
        try:
            payloads = dict(enumerate(self._coordinator.gather(self._key(key), _pack(own), self._timeout_s) or []))
        except PeerError as error:
            missing, cause, payloads = error.ranks, str(error), dict(error.payloads)
        except Exception as error:
            return Failure(f"rank 0 could not hear the others: {error}", (0,)), []
        try:
            with without_collector():
                answers = _unpack(payloads)
            failed = {rank: answer for rank, answer in answers.items() if answer["failure"] is not None}
        except (ValueError, KeyError, TypeError) as error:
            return Failure(f"rank 0 did not understand the others: {error!r}", (0,)), []
        if failed:  # a known cause says more than a silence, which may be its consequence
            skipped = all(answer["skipped"] for answer in failed.values())
            return Failure(_list_failures(failed), tuple(failed), skipped), []
        if cause:
            return Failure(cause, missing), []
        strays = {rank: answer["what"] for rank, answer in answers.items() if answer["what"] != own["what"]}
        if strays:
            rank, what = next(iter(strays.items()))
            text = f"rank {rank} saves {what} where rank 0 saves {own['what']}: all ranks must make the same saves"
            return Failure(text, tuple(strays)), []
        return None, [answers[rank] for rank in sorted(answers)]

    def collect_texts(self, key: str) -> list[str]:
        """On rank 0: what the others say for a message; empty from those that say nothing."""
        try:
            payloads = self._coordinator.gather(self._key(key), b"", self._timeout_s) or []
        except PeerError as error:
            payloads = [error.payloads.get(rank, b"") for rank in range(self.world_size)]
        except Exception:  # it was for the message only
            payloads = []
        return [payload.decode(errors="replace") for payload in payloads]

    def tell(self, key: str, said: Mapping[str, Any]) -> None:
        """On rank 0. Failing to is only logged: what is published is published."""
        try:
            self._coordinator.broadcast(self._key(key), _pack(said), self._timeout_s)
        except CheckpointError as error:
            logger.error("telling the other ranks the outcome of a save failed: %s", error)

    def tell_outcome(self, key: str, failure: Failure | None, **more: Any) -> None:
        self.tell(key, {"failure": failure and dataclasses.asdict(failure), **more})

    def answer(self, key: str, own: Mapping[str, Any]) -> None:
        """On the other ranks.

        Raises:
            StorageError: rank 0 will not get it.
            PeerError: it may or may not.
        """
        self._coordinator.gather(self._key(key), _pack(own), self._timeout_s)

    def answer_text(self, key: str, text: str) -> None:
        self._coordinator.gather(self._key(key), text.encode(), self._timeout_s)

    def hear(self, key: str) -> dict[str, Any]:
        """On the other ranks: what rank 0 tells.

        Raises:
            PeerError: nothing came.
        """
        # Rank 0 begins to wait for the slowest when its own files are ready, which may be later than ours by as much again; and
        # then it publishes.
        return dict(json.loads(self._coordinator.broadcast(self._key(key), None, 3 * self._timeout_s)))

    def _key(self, key: str) -> str:
        return f"{self._stream}/{key}"


def outcome_of(said: Mapping[str, Any]) -> Failure | None:
    """What tell_outcome() told."""
    failure = said["failure"]
    return None if failure is None else Failure(failure["text"], tuple(failure["ranks"]), failure["skipped"], failure["stands"])


def failed_answer(what: str, error: BaseException) -> dict[str, Any]:
    return {"what": what, "failure": str(error) or type(error).__name__, "skipped": isinstance(error, SkippedError)}


def good_answer(what: str, **more: Any) -> dict[str, Any]:
    return {"what": what, "failure": None, "skipped": False, **more}


def answer_for(what: str, error: BaseException | None) -> dict[str, Any]:
    return good_answer(what) if error is None else failed_answer(what, error)


def _pack(said: Mapping[str, Any]) -> bytes:
    return json.dumps(said).encode()


def _unpack(payloads: Mapping[int, bytes]) -> dict[int, dict[str, Any]]:
    """All at once where that gives one answer for each rank: thousands of calls take three times as long.

    Raises:
        ValueError: a rank has sent something else.
    """
    with contextlib.suppress(ValueError):
        answers = json.loads(b"[" + b",".join(payloads.values()) + b"]")
        if len(answers) == len(payloads):
            return dict(zip(payloads, answers, strict=True))
    return {rank: json.loads(payload) for rank, payload in payloads.items()}


def _list_failures(failed: Mapping[int, Mapping[str, Any]]) -> str:
    """The first few ranks and their causes; the same cause once."""
    causes: dict[str, list[int]] = {}
    for rank, answer in sorted(failed.items()):
        causes.setdefault(answer["failure"], []).append(rank)
    shown = [
        f"rank {', '.join(map(str, ranks[:4]))}{' and more' if len(ranks) > 4 else ''}: {c}" for c, ranks in causes.items()
    ]
    return "; ".join(shown[:3]) + ("; ..." if len(shown) > 3 else "")
