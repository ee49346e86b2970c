"""Two-phase commit: a step is a checkpoint when the files of every rank are durable, and not before.

    prepare    every rank: its files have their names, durably; or an error. Rank 0 gathers all of it.
    publish    rank 0, if all are well and alike: manifest, then `latest`. See StepDirectories.publish().
    verdict    rank 0 tells everybody. Only now a rank's result() returns, or it takes its files back.

A rank that does not hear the verdict does not know the outcome, and leaves its files alone: the manifest decides. Every save()
takes part, also one that failed before it began, because the others wait for word from it. Runs on the finisher's thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt.commit.conversation import Failure, RankConversation, failed_answer, good_answer
from ckpt.commit.replica_check import Digest, Replica, compare_shares, digest_of_replica, explain, replica_of, reply
from ckpt.commit.rounds import Answers, Ask, Round, Verdict
from ckpt.commit.shared_file import WrittenShare, join_shares, share_of
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.directory.steps import StepDirectories
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.storage import durable


@dataclasses.dataclass(frozen=True)
class StepFile:
    """One file of a step, as far as this rank is concerned."""

    file: FileInFlight
    kind: str  # as in the manifest
    written: bool  # by this rank, or its share of it; else it is only compared

    @property
    def is_shared(self) -> bool:
        """All ranks write it together, and rank 0 gives it its name."""
        return self.file.write_share is not None


@dataclasses.dataclass(frozen=True)
class Ticket:
    """One call of save(), the same on all ranks."""

    number: int
    step: int
    directory: Path
    parts: tuple[StepFile, ...] = ()

    @property
    def what(self) -> str:
        return f"step {self.step}"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a rank says in the first phase, if all is well."""

    files: tuple[FileEntry, ...] = ()
    digests: tuple[Digest, ...] = ()
    shares: tuple[WrittenShare, ...] = ()

    @staticmethod
    def parse(said: Mapping[str, Any]) -> Prepared:
        files = manifests.parse_files(said["files"])
        digests = tuple(Digest(**digest) for digest in said["digests"])
        return Prepared(files, digests, tuple(WrittenShare(**share) for share in said["shares"]))


class StepCommitter:
    """See the module."""

    def __init__(self, directories: StepDirectories, conversation: RankConversation) -> None:
        self._directories = directories
        self._conversation = conversation

    def commit(self, ticket: Ticket, error: BaseException | None) -> Path:
        """
        Args:
            error: what has already gone wrong on this rank.

        Returns:
            The step's directory, which is a checkpoint now.

        Raises:
            PeerError: another rank failed, or does not answer. Or what went wrong here.
        """
        own, error = self._prepare(ticket, error)
        round_ = Round(
            self._conversation,
            f"{ticket.number}-prepared",
            f"{ticket.what} to '{ticket.directory}'",
            undo=lambda by_all: self._take_back(ticket, by_all),
            answered=lambda: durable.crash_point("prepared"),
            reply=lambda question: reply(question, _replica(ticket), self._conversation.rank),
        )
        round_.hold(own, error, lambda answers: self._publish(ticket, answers, round_.ask))
        return ticket.directory

    # ---- prepare ---------------------------------------------------------------------------------------------------

    def _prepare(self, ticket: Ticket, error: BaseException | None) -> tuple[dict[str, Any], BaseException | None]:
        """Gives this rank's files their names. An error is a message to the others, too."""
        try:
            if error is not None:
                raise error
            files = tuple(self._place(step_file) for step_file in ticket.parts if step_file.written and not step_file.is_shared)
            prepared = Prepared(files)
            if self._conversation.world_size > 1:
                shares = tuple(share_of(step_file.file) for step_file in ticket.parts if step_file.is_shared)
                digests = tuple(digest_of_replica(step_file.file) for step_file in ticket.parts if step_file.kind == REPLICATED)
                prepared = Prepared(files, digests, shares)
        except BaseException as caught:
            return failed_answer(ticket.what, caught), caught.with_traceback(None)
        return good_answer(ticket.what, **dataclasses.asdict(prepared)), None

    def _place(self, step_file: StepFile) -> FileEntry:
        self._directories.give_final_name(step_file.file.temporary, step_file.file.target)
        job = step_file.file.job
        return FileEntry(step_file.file.target.name, job.size, job.crc32, step_file.kind, self._conversation.rank)

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def _publish(self, ticket: Ticket, said: Answers, ask: Ask) -> Verdict:
        manifest = None
        try:
            answers = [Prepared.parse(answer) for answer in said]
            if (failure := _compare(ticket, answers, ask)) is not None:
                return Verdict(failure)
            before = manifests.read_if_any(ticket.directory)
            files = tuple(file for answer in answers for file in answer.files) + self._join_shares(ticket, answers)
            others = self._directories.others_in(ticket.directory, files, before)
            world, sequence = self._conversation.world_size, self._directories.take_sequence()
            manifest = Manifest(ticket.step, sequence, world, files, others=others)
            self._directories.publish(manifest, ticket.directory)
        except Exception as caught:
            error = caught.with_traceback(None)
            if manifest is None or not manifests.stands(manifest, ticket.directory):
                return Verdict(Failure(f"rank 0 could not publish it: {error}", (0,)), error)
            text = f"it is a checkpoint, but not all of it is certain to last: {error}"
            return Verdict(Failure(text, (0,), stands=True), error)
        durable.crash_point("published")
        # Before the others hear of it: afterwards they may be writing the next save into what is removed here.
        self._directories.tidy(ticket.directory, manifest, before)
        durable.crash_point("tidied")
        return Verdict()

    def _join_shares(self, ticket: Ticket, answers: Sequence[Prepared]) -> tuple[FileEntry, ...]:
        """Completes the files that all ranks have written, and gives them their names."""
        joined = []
        for number, step_file in enumerate(step_file for step_file in ticket.parts if step_file.is_shared):
            durable.crash_point("shares-written")
            crc = join_shares(step_file.file, [answer.shares[number] for answer in answers])
            self._directories.give_final_name(step_file.file.temporary, step_file.file.target)
            joined.append(FileEntry(step_file.file.target.name, step_file.file.job.size, crc, step_file.kind))
        return tuple(joined)

    def _take_back(self, ticket: Ticket, by_all: bool) -> None:
        """The files that this rank has given their names.

        Args:
            by_all: else rank 0 may still be busy with what all write together, and removes that.
        """
        for step_file in ticket.parts if by_all else ():
            step_file.file.given_up = step_file.is_shared
        self._remove_unpublished(ticket)

    def _remove_unpublished(self, ticket: Ticket) -> None:
        """Of a step that will not be published: the files that this rank has given their names."""
        for step_file in ticket.parts:
            if step_file.written and (self._conversation.rank == 0 or not step_file.is_shared):
                self._directories.remove_unpublished(step_file.file.target)


def _replica(ticket: Ticket) -> Replica | None:
    return next((replica_of(step_file.file) for step_file in ticket.parts if step_file.kind == REPLICATED), None)


def _compare(ticket: Ticket, answers: Sequence[Prepared], ask: Ask) -> Failure | None:
    differing = tuple(rank for rank, answer in enumerate(answers) if answer.digests != answers[0].digests)
    if differing:
        return explain(_replica(ticket), differing, ask)
    shared = [step_file.file for step_file in ticket.parts if step_file.is_shared]
    return compare_shares(shared, [answer.shares for answer in answers])
