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

from ckpt.commit.conversation import Failure, RankConversation, failed_answer, good_answer, outcome_of
from ckpt.commit.record_path import name_of_record
from ckpt.commit.replica_check import Digest, Replica, difference, digest_of, without_devices
from ckpt.commit.shared_file import WrittenShare, find_disagreement, join_shares, share_of
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.directory.steps import StepDirectories
from ckpt.errors import StorageError
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.storage import durable

_NOT_ALIKE = "the replicated state is not the same on all ranks: "
_REMEDY = (
    ". Give what differs as the rank's own state (state= of save(), data= of the callback), or make it the same on every rank, "
    "to the byte"
)
# Other differences between pickles show in their digests.
_REMEDY_FOR_DEVICES = (
    ": the devices of its tensors have other names there. Let each process see its own device alone (CUDA_VISIBLE_DEVICES), or "
    "let rank 0 write it all (Options.replicated_writers='rank0')"
)


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
        prepared, error = self._prepare(ticket, error)
        if self._conversation.rank == 0:
            failure, error = self._lead(ticket, prepared, error)
        else:
            failure, error = self._follow(ticket, prepared, error)
        if failure is None:
            return ticket.directory
        if not failure.stands:
            for step_file in ticket.parts:
                step_file.file.given_up = step_file.is_shared
            self._remove_unpublished(ticket)
        raise error if error is not None else failure.to_error(f"{ticket.what} to '{ticket.directory}'")

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
                digests = tuple(_digest(step_file) for step_file in ticket.parts if step_file.kind == REPLICATED)
                prepared = Prepared(files, digests, shares)
        except BaseException as caught:
            return failed_answer(ticket.what, caught), caught.with_traceback(None)
        return good_answer(ticket.what, **dataclasses.asdict(prepared)), None

    def _place(self, step_file: StepFile) -> FileEntry:
        self._directories.give_final_name(step_file.file.temporary, step_file.file.target)
        job = step_file.file.job
        return FileEntry(step_file.file.target.name, job.size, job.crc32, step_file.kind, self._conversation.rank)

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def _lead(
        self, ticket: Ticket, own: Mapping[str, Any], error: BaseException | None
    ) -> tuple[Failure | None, BaseException | None]:
        failure, said = self._conversation.collect(f"{ticket.number}-prepared", own)
        durable.crash_point("prepared")
        manifest = before = None
        differing: tuple[int, ...] = ()
        if failure is None:
            try:
                answers = [Prepared.parse(answer) for answer in said]
                differing = tuple(rank for rank, answer in enumerate(answers) if answer.digests != answers[0].digests)
                failure = self._explain(ticket, differing) if differing else _compare_shares(ticket, answers)
                if failure is None:
                    before = manifests.read_if_any(ticket.directory)
                    files = tuple(file for answer in answers for file in answer.files) + self._join_shares(ticket, answers)
                    others = self._directories.others_in(ticket.directory, files, before)
                    world, sequence = self._conversation.world_size, self._directories.take_sequence()
                    manifest = Manifest(ticket.step, sequence, world, files, others=others)
                    self._directories.publish(manifest, ticket.directory)
            except Exception as caught:
                error = caught.with_traceback(None)
                failure = Failure(f"rank 0 could not publish it: {error}", (0,))
                if manifest is not None and manifests.stands(manifest, ticket.directory):
                    failure = Failure(f"it is a checkpoint, but not all of it is certain to last: {error}", (0,), stands=True)
        durable.crash_point("published")
        if manifest is not None and failure is None:
            # Before the others hear of it: afterwards they may be writing the next save into what is removed here.
            self._directories.tidy(ticket.directory, manifest, before)
            durable.crash_point("tidied")
        self._conversation.tell_outcome(f"{ticket.number}-verdict{'-again' if differing else ''}", failure)
        return failure, error

    def _join_shares(self, ticket: Ticket, answers: Sequence[Prepared]) -> tuple[FileEntry, ...]:
        """Completes the files that all ranks have written, and gives them their names."""
        joined = []
        for number, step_file in enumerate(step_file for step_file in ticket.parts if step_file.is_shared):
            durable.crash_point("shares-written")
            crc = join_shares(step_file.file, [answer.shares[number] for answer in answers])
            self._directories.give_final_name(step_file.file.temporary, step_file.file.target)
            joined.append(FileEntry(step_file.file.target.name, step_file.file.job.size, crc, step_file.kind))
        return tuple(joined)

    def _explain(self, ticket: Ticket, differing: tuple[int, ...]) -> Failure:
        """Asks the ranks whose replicated state is not that of rank 0 for the first difference."""
        ours = _replica(ticket)
        compare = ours.to_message() if ours is not None else None
        self._conversation.tell(f"{ticket.number}-verdict", {"compare": compare, "ranks": differing})
        texts = self._conversation.collect_texts(f"{ticket.number}-differences")
        first = differing[0]
        found = texts[first] if first < len(texts) else ""
        who = f"that of {_in_words(differing)} differs" if len(differing) == 1 else f"those of {_in_words(differing)} differ"
        text = f"{_NOT_ALIKE}{who} from that of rank 0" + (f", {found}" if found else "")
        return Failure(text + _REMEDY, differing)

    # ---- the other ranks -------------------------------------------------------------------------------------------

    def _follow(
        self, ticket: Ticket, own: Mapping[str, Any], error: BaseException | None
    ) -> tuple[Failure | None, BaseException | None]:
        """
        Raises:
            PeerError: the verdict did not come. The step may have been committed or not.
            Exception: what went wrong here, and could not be told to rank 0.
        """
        rank = self._conversation.rank
        try:
            self._conversation.answer(f"{ticket.number}-prepared", own)
        except StorageError as undelivered:
            # Rank 0 cannot publish without our word. But it may still be busy with what all write together, and removes that.
            self._remove_unpublished(ticket)
            raise error or undelivered.with_traceback(None) from None
        durable.crash_point("prepared")
        verdict = self._conversation.hear(f"{ticket.number}-verdict")
        if "compare" in verdict:
            text = ""
            if rank in verdict["ranks"]:
                theirs = Replica.from_message(verdict["compare"]) if verdict["compare"] is not None else None
                text = difference(_replica(ticket), theirs, rank, 0)
            self._conversation.answer_text(f"{ticket.number}-differences", text)
            verdict = self._conversation.hear(f"{ticket.number}-verdict-again")
        return outcome_of(verdict), error

    def _remove_unpublished(self, ticket: Ticket) -> None:
        """Of a step that will not be published: the files that this rank has given their names."""
        for step_file in ticket.parts:
            if step_file.written and (self._conversation.rank == 0 or not step_file.is_shared):
                self._directories.remove_unpublished(step_file.file.target)


def _digest(step_file: StepFile) -> Digest:
    file = step_file.file
    return digest_of(file.pickle, file.sizes, file.job.layout_crc32 if step_file.is_shared else 0, file.samples)


def _replica(ticket: Ticket) -> Replica | None:
    for step_file in ticket.parts:
        if step_file.kind == REPLICATED:
            return Replica(_digest(step_file), without_devices(step_file.file.pickle), step_file.file.samples)
    return None


def _compare_shares(ticket: Ticket, answers: Sequence[Prepared]) -> Failure | None:
    """What samples have not seen, of the records that several ranks write."""
    for number, step_file in enumerate(step_file for step_file in ticket.parts if step_file.is_shared):
        found = find_disagreement([answer.shares[number] for answer in answers])
        if found is not None:
            key = found.record - step_file.file.first_record
            wrote = f"{_in_words(found.writers)} {'has' if len(found.writers) == 1 else 'have'} written"
            if key >= 0:
                what = name_of_record(step_file.file.pickle, key)
                text = f"rank {found.reader} holds other values of {what} than {wrote}{_REMEDY}"
            else:
                text = f"rank {found.reader} has pickled it otherwise than {wrote}{_REMEDY_FOR_DEVICES}"
            return Failure(_NOT_ALIKE + text, (found.reader,))
    return None


_MOST_NAMED = 8  # ranks in a message


def _in_words(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named = [str(rank) for rank in ranks[:_MOST_NAMED]]
    named += [f"{len(ranks) - _MOST_NAMED} more"] if len(ranks) > _MOST_NAMED else []
    return f"ranks {', '.join(named[:-1])} and {named[-1]}"
