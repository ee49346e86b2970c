"""The round that every commit is made of, one or several of them.

    answer     every rank tells rank 0 that all is well with it, or what went wrong
    act        rank 0, if all are well
    verdict    rank 0 tells everybody what came of that

While rank 0 acts it may ask the others once, if it needs their words to say what is wrong.

How it can end, other than well:

    a rank fails, or is silent    Rank 0 does not act. The save fails on all ranks, and they take their files back.
    all that fail have skipped    The same, but it is no failure: SkippedError.
    an answer is not delivered    Rank 0 cannot act without it. So the rank takes its files back, and waits for nothing.
    it may have been delivered,   The rank does not know the outcome. It raises PeerError and leaves its files alone: the
    or no verdict comes           manifest decides.
    a failure stands              The manifest has its name all the same, so the files are a checkpoint's, and stay. After the
                                  round that has decided, every failure stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt.commit.conversation import Failure, RankConversation, outcome_of
from ckpt.errors import StorageError

Answers = Sequence[Mapping[str, Any]]
Ask = Callable[[Mapping[str, Any]], list[str]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of it on rank 0.

    Attributes:
        error: what rank 0 raises, if it is rank 0 that failed.
        more: what the others are told if all is well.
    """

    failure: Failure | None = None
    error: BaseException | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Round:
    """
    Args:
        key: names it in the conversation.
        what: is saved, in words for errors.
        undo: takes files back that will not be published. It is told whether all ranks do so; else only this one knows it yet.
            None: the files are a checkpoint's already.
        answered: runs when this rank has answered, or, on rank 0, when it has the answers.
        reply: answers what rank 0 asks.
        also: what rank 0 tells beside its verdict, given the failure, if there is one, and the answers, if it has all of them.
        heard: gets all that rank 0 tells, on every rank.
    """

    def __init__(
        self,
        conversation: RankConversation,
        key: str,
        what: str,
        *,
        undo: Callable[[bool], None] | None = None,
        answered: Callable[[], object] | None = None,
        reply: Callable[[Mapping[str, Any]], str] | None = None,
        also: Callable[[Failure | None, Answers], Mapping[str, Any]] | None = None,
        heard: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._conversation = conversation
        self._key = key
        self._what = what
        self._undo = undo
        self._answered = answered
        self._reply = reply
        self._also = also
        self._heard = heard
        self._asked = False

    def hold(self, own: Mapping[str, Any], error: BaseException | None, act: Callable[[Answers], Verdict]) -> Mapping[str, Any]:
        """
        Args:
            own: this rank's answer.
            error: what it says went wrong here, if that is so.
            act: what rank 0 does. It tells of its failures by the verdict, and raises nothing: the others wait for word.

        Returns:
            What rank 0 tells.

        Raises:
            PeerError: another rank failed, or does not answer. Or what went wrong here.
        """
        if self._conversation.rank == 0:
            failure, error, said = self._lead(own, error, act)
        else:
            failure, said = self._follow(own, error)
        if self._heard is not None:
            self._heard(said)
        if failure is None:
            return said
        if not failure.stands and self._undo is not None:
            self._undo(True)
        raise error if error is not None else failure.to_error(self._what)

    def ask(self, question: Mapping[str, Any]) -> list[str]:
        """On rank 0, while it acts: what the ranks say to that; empty from those that say nothing."""
        self._asked = True
        self._conversation.tell(f"{self._key}-verdict", {"question": question})
        return self._conversation.collect_texts(f"{self._key}-replies")

    def _lead(
        self, own: Mapping[str, Any], error: BaseException | None, act: Callable[[Answers], Verdict]
    ) -> tuple[Failure | None, BaseException | None, Mapping[str, Any]]:
        failure, answers = self._conversation.collect(self._key, own)
        if self._answered is not None:
            self._answered()
        if failure is not None:
            verdict = Verdict(dataclasses.replace(failure, stands=self._undo is None), error)
        else:
            verdict = act(answers)
        key = f"{self._key}-verdict{'-again' if self._asked else ''}"
        more = {**verdict.more, **(self._also(verdict.failure, answers) if self._also is not None else {})}
        self._conversation.tell_outcome(key, verdict.failure, **more)
        return verdict.failure, verdict.error, more

    def _follow(self, own: Mapping[str, Any], error: BaseException | None) -> tuple[Failure | None, Mapping[str, Any]]:
        try:
            self._conversation.answer(self._key, own)
        except StorageError as undelivered:
            if self._undo is not None:
                self._undo(False)
            raise error or undelivered.with_traceback(None) from None
        if self._answered is not None:
            self._answered()
        said = self._conversation.hear(f"{self._key}-verdict")
        if "question" in said and self._reply is not None:
            self._conversation.answer_text(f"{self._key}-replies", self._reply(said["question"]))
            said = self._conversation.hear(f"{self._key}-verdict-again")
        return outcome_of(said), said
