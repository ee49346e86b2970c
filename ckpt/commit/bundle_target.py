"""Two-phase commit of bundles. Unlike that of steps, it may replace files, see directory/bundles.py; so it has one phase more.

    prepare    every rank: its files are durable under temporary names; or an error. Rank 0 gathers all of it.
    publish    rank 0, if all are well: the manifest. Now the bundle is a checkpoint. It tells everybody.
    place      every rank: its files get their own names. Rank 0 gathers that.
               Of a file that several ranks have written, that of the lowest rank does; the others go.
    latest     rank 0 moves it, and tells everybody.

Where nodes have directories of their own, the first rank of each node writes manifest and `latest` there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt.commit.conversation import Failure, RankConversation, answer_for, failed_answer, good_answer
from ckpt.commit.replica_check import Digest, digest_of, without_numbers
from ckpt.commit.rounds import Answers, Round, Verdict
from ckpt.directory import bundles
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import BundleRoot
from ckpt.directory.manifest import RANK, FileEntry, Manifest
from ckpt.errors import CheckpointError, StorageError
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.storage import durable


@dataclasses.dataclass(frozen=True)
class BundleTicket:
    """One bundle, the same on all ranks but for the files.

    Attributes:
        name: of the directory, as `latest` gives it.
        step: goes into the manifest.
        held: the directory, if it is there: all goes there, although a framework may rename it meanwhile.
        root: None on ranks that publish nothing.
        node: names the directory tree that this rank sees; the same on all ranks if they share one.
    """

    number: int
    directory: Path
    name: str
    step: int
    move_latest: bool
    root: BundleRoot | None = None
    node: str = ""
    files: tuple[FileInFlight, ...] = ()
    held: durable.Directory | None = None

    @property
    def what(self) -> str:
        return f"'{self.name}'"

    @property
    def place(self) -> Path:
        """The directory, whatever it is called by now."""
        return self.directory if self.held is None else self.held.reach


class BundleCommitter:
    """See the module.

    Args:
        varying: keys of integers in which files of the same name may differ.
    """

    def __init__(self, conversation: RankConversation, varying: tuple[str, ...] = ()) -> None:
        self._conversation = conversation
        self._varying = varying
        self._doubt: StorageError | None = None  # of the present ticket, as the next
        self._is_empty = False

    def commit(self, ticket: BundleTicket, error: BaseException | None) -> Path:
        """
        Args:
            error: what has already gone wrong on this rank.

        Returns:
            The bundle's directory, which is a checkpoint now.

        Raises:
            PeerError: another rank failed, or does not answer. Or what went wrong here.
        """
        entries: tuple[FileEntry, ...] = ()
        try:
            if error is not None:
                raise error
            files = [file for file in ticket.files if file.target.parent == ticket.directory]
            entries = tuple(self._entry(file) for file in files)
            own = good_answer(
                ticket.what,
                node=ticket.node,
                files=[dataclasses.asdict(entry) for entry in entries],
                digests=[dataclasses.asdict(self._digest(file)) for file in files],
            )
        except BaseException as caught:
            error = caught.with_traceback(None)
            own = failed_answer(ticket.what, error)
        for file in ticket.files:
            # Once rank 0 has our word, the manifest may name it, whatever we hear of that.
            file.undecided = error is None and file.target.parent == ticket.directory
        self._doubt = None
        said = self._first_round(ticket).hold(own, error, lambda answers: self._publish(ticket, answers))
        error = self._place(ticket, entries, said)
        own = answer_for(ticket.what, error)
        placed = self._later_round(ticket, "placed", lambda: self._conversation.rank == 0 and durable.crash_point("all-placed"))
        placed.hold(own, error, lambda _: self._finish(ticket))
        if ticket.node:
            self._point_latest_on_nodes(ticket, said)
        return ticket.directory if ticket.held is None else ticket.held.now()

    def _first_round(self, ticket: BundleTicket) -> Round:
        def undo(_: bool) -> None:
            for file in ticket.files:
                file.undecided = False

        key, what = f"{ticket.number}-prepared", _what_and_where(ticket)
        return Round(self._conversation, key, what, undo=undo, answered=lambda: durable.crash_point("prepared"))

    def _later_round(self, ticket: BundleTicket, phase: str, answered: Callable[[], object] | None = None) -> Round:
        return Round(self._conversation, f"{ticket.number}-{phase}", _what_and_where(ticket), answered=answered)

    def _point_latest_on_nodes(self, ticket: BundleTicket, said: Mapping[str, Any]) -> None:
        error = None
        if self._conversation.rank != 0 and said["files"].get(ticket.node):
            try:
                self._point_latest(ticket)
            except CheckpointError as caught:
                error = caught.with_traceback(None)
        own = answer_for(ticket.what, error)
        self._later_round(ticket, "pointed").hold(own, error, lambda _: Verdict())

    def _entry(self, file: FileInFlight) -> FileEntry:
        return FileEntry(file.target.name, file.job.size, file.job.crc32, RANK, self._conversation.rank, file.temporary.name)

    def _digest(self, file: FileInFlight) -> Digest:
        digest = digest_of(without_numbers(file.pickle, self._varying), file.sizes, 0)
        file.forget_structure()
        return digest

    def _place(self, ticket: BundleTicket, entries: Sequence[FileEntry], said: Mapping[str, Any]) -> BaseException | None:
        dropped = set(said["dropped"])
        for file in ticket.files:
            if file.temporary.name in dropped and file.target.parent == ticket.directory:
                file.undecided = False
                file.discard()
        try:
            if self._conversation.rank != 0 and ticket.root is not None:  # of a node with a directory of its own
                files = manifests.parse_files(said["files"].get(ticket.node, []))
                if files:
                    manifest = Manifest(ticket.step, said["sequence"], self._conversation.world_size, files)
                    ticket.root.publish(ticket.place, manifest, ticket.directory)
            bundles.give_final_names(ticket.place, [entry for entry in entries if entry.temporary not in dropped])
            for file in ticket.files:
                if file.target.parent != ticket.directory:
                    durable.rename_durably(file.reach(file.temporary), file.reach(file.target))
        except Exception as caught:
            return caught.with_traceback(None)
        durable.crash_point("placed")
        return None

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def _publish(self, ticket: BundleTicket, answers: Answers) -> Verdict:
        assert ticket.root is not None
        try:
            files, dropped = _one_of_each(answers)
            sequence = ticket.root.take_sequence()
            self._is_empty = not any(files.values())
            if own := files.pop(ticket.node, []):
                manifest = Manifest(ticket.step, sequence, self._conversation.world_size, tuple(own))
                self._publish_manifest(ticket, manifest)
            durable.crash_point("published")
            elsewhere = {node: [dataclasses.asdict(file) for file in there] for node, there in files.items()}
            return Verdict(more={"sequence": sequence, "files": elsewhere, "dropped": dropped})
        except Exception as caught:
            error = caught.with_traceback(None)
            return Verdict(Failure(f"rank 0 could not publish it: {error}", (0,)), error)

    def _publish_manifest(self, ticket: BundleTicket, manifest: Manifest) -> None:
        assert ticket.root is not None
        try:
            ticket.root.publish(ticket.place, manifest, ticket.directory)
        except StorageError as error:
            if not manifests.stands(manifest, ticket.place):
                raise
            self._doubt = error.with_traceback(None)  # it is decided, but may not last: the files get their names all the same

    def _finish(self, ticket: BundleTicket) -> Verdict:
        if self._doubt is not None:
            text = f"it may not survive a crash of the system: {self._doubt}"
            return Verdict(Failure(text, (0,), stands=True), self._doubt)
        try:
            if not self._is_empty:
                self._point_latest(ticket)
        except Exception as caught:
            error = caught.with_traceback(None)
            return Verdict(Failure(f"it is a checkpoint, but `latest` was not moved: {error}", (0,), stands=True), error)
        return Verdict()

    def _point_latest(self, ticket: BundleTicket) -> None:
        if ticket.move_latest and ticket.root is not None:
            ticket.root.point_latest(ticket.name if ticket.held is None else ticket.root.name_of(ticket.held, ticket.name))


def _what_and_where(ticket: BundleTicket) -> str:
    return f"{ticket.what} to '{ticket.directory.parent}'"


def _one_of_each(answers: Answers) -> tuple[dict[str, list[FileEntry]], list[str]]:
    """The files of each node, each name once: of the lowest rank that writes it; and the temporary names of the others.

    Raises:
        CheckpointError: two ranks have written a file, and its structure differs.
    """
    chosen: dict[str, dict[str, tuple[FileEntry, Any]]] = {}
    dropped = []
    for answer in answers:
        there = chosen.setdefault(answer["node"], {})
        for file, digest in zip(manifests.parse_files(answer["files"]), answer["digests"], strict=True):
            first, expected = there.setdefault(file.name, (file, digest))
            if first.rank != file.rank:
                if digest != expected:
                    raise CheckpointError(
                        f"ranks {first.rank} and {file.rank} both write '{file.name}', and not the same: its structure, its "
                        "values beside tensors or the sizes of its tensors differ. Let one rank write it, or use two names"
                    )
                dropped.append(file.temporary)
            elif first is not file:  # written again by the same rank
                dropped.append(first.temporary)
                there[file.name] = file, digest
    return {node: [file for file, _ in there.values()] for node, there in chosen.items()}, dropped
