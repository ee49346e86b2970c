"""How a save becomes a checkpoint: when the files of every rank are durable, and not before.

    prepare    every rank: its files are durable; or an error. Rank 0 gathers all of it.
    decide     rank 0, if all are well: the manifest. Now the files are a checkpoint. It tells everybody.

Files of a step have their own names by then, and `latest` is moved with the manifest, so one round is enough. A bundle may
replace files, see directory/bundles.py, so more rounds follow:

    name       every rank: its files get their own names. Rank 0 gathers that.
               Of a file that several ranks have written, that of the lowest rank does; the others go.
    latest     rank 0 moves it, and tells everybody.

Where nodes have directories of their own, the first rank of each node writes manifest and `latest` there. A step on the
disks of nodes has one manifest, of the files of all of them; when rank 0 has written it, one more round follows:

    spread     the first rank of each other node: the same manifest. Rank 0 gathers that, and tells everybody.

rounds.py says what a round is, and what becomes of the files when one fails. Every save() takes part, also one that failed
before it began, because the others wait for word from it. Runs on the finisher's thread.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt.collector import without_collector
from ckpt.commit.bypass import BypassVote
from ckpt.commit.conversation import Failure, RankConversation, answer_for, failed_answer, good_answer
from ckpt.commit.rounds import Answers, Ask, Round, Verdict
from ckpt.commit.target import Prepared, PublicationTarget, SavedFile
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.errors import CheckpointError
from ckpt.saving.pending import PendingSave
from ckpt.saving.task import SaveTask
from ckpt.storage import durable


class Publication:
    """That of one save; see the module."""

    def __init__(
        self, conversation: RankConversation, target: PublicationTarget, task: SaveTask, bypass: BypassVote | None = None
    ) -> None:
        """
        Args:
            task: is told number, slowest rank and figures of all ranks of its commit.
            bypass: of a job that saves by way of its nodes.
        """
        self._task = task
        self._conversation = conversation
        self._target = target
        self._call = target.call
        self._bypass = bypass
        self._listed: list[tuple[SavedFile, FileEntry]] = []  # of this rank's files, those that a manifest is to name
        # On rank 0, once it has decided:
        self._doubt: BaseException | None = None  # whether the manifest lasts
        self._is_empty = False
        self.sequence = -1  # of the commit, once rank 0 has decided
        self._slowest = 0  # the rank whose files took longest to be durable
        self._cost: Mapping[str, float] = {}  # see Manifest.cost
        self.dropped: frozenset[str] = frozenset()  # see Choice

    def run(self, error: BaseException | None) -> Path:
        """
        Args:
            error: what has already gone wrong on this rank.

        Returns:
            The directory, which is a checkpoint now.

        Raises:
            PeerError: another rank failed, or does not answer. Or what went wrong here.
        """
        own, error = self._prepare(error)
        stats = PendingSave(self._task).stats
        own |= {"blocked_s": stats.blocked_s, "flushed_s": stats.flushed_s or 0.0}
        if self._bypass is not None:
            own |= self._bypass.say()
        first = self._round(
            "prepared",
            undo=self._undo,
            answered=lambda: durable.crash_point("prepared"),
            reply=self._target.reply,
            also=self._say_bypass,
            heard=self._hear_bypass,
        )
        said = first.hold(own, error, lambda answers: self._decide(answers, first.ask))
        self.sequence, self.dropped = said["sequence"], frozenset(said["dropped"])
        self._task.sequence, self._task.slowest_rank, self._task.all_ranks = self.sequence, said["slowest"], said["all_ranks"]
        if self._target.names_late:
            self._name_late(said)
        elif self._target.spread:
            self._spread(said)
        return self._target.path()

    def _round(self, phase: str, **hooks: Any) -> Round:
        call = self._call
        return Round(self._conversation, f"{call.number}-{phase}", f"{call.what} to '{call.where}'", **hooks)

    def _manifest(self, sequence: int, files: Sequence[FileEntry], others: tuple[str, ...] = ()) -> Manifest:
        call, world_size = self._call, self._conversation.world_size
        made = Manifest(call.step, sequence, world_size, tuple(files), manifests.now(), others)
        made = dataclasses.replace(made, bundle=call.bundle, moves_latest=call.moves_latest)
        return dataclasses.replace(made, metrics=call.metrics, cost=self._cost)

    def _say_bypass(self, failure: Failure | None, answers: Answers) -> Mapping[str, Any]:
        return {} if self._bypass is None else self._bypass.decide(failure, answers, self._target.node != "")

    def _hear_bypass(self, said: Mapping[str, Any]) -> None:
        if self._bypass is not None:
            self._bypass.hear(self._call.number, said)

    # ---- the first round -------------------------------------------------------------------------------------------

    def _prepare(self, error: BaseException | None) -> tuple[dict[str, Any], BaseException | None]:
        """What this rank says. An error is a message to the others, too."""
        try:
            if error is not None:
                raise error
            for file in self._call.files:
                self._listed.extend((file, entry) for entry in self._target.name_now(file))
            prepared = self._target.describe(tuple(entry for _, entry in self._listed))
        except BaseException as caught:
            return failed_answer(self._call.what, caught), caught.with_traceback(None)
        if not self._target.names_late:
            self._task.named_at = time.monotonic()
        for file, entry in self._listed:
            # Once rank 0 has our word, the manifest may name it, whatever we hear of that.
            file.file.undecided = entry.temporary != ""
        return good_answer(self._call.what, **prepared.to_message()), None

    def _undo(self, by_all: bool) -> None:
        for file in self._call.files:
            self._target.undo(file, by_all)

    def _decide(self, answers: Answers, ask: Ask) -> Verdict:
        """On rank 0."""
        try:
            with without_collector():
                prepared = [Prepared.parse(answer) for answer in answers]
            choice = self._target.choose(prepared, ask)
            if isinstance(choice, Failure):
                return Verdict(choice)
            sequence = self._target.take_sequence()
            self._note_cost(answers)
            manifest = self._manifest(sequence, choice.files, choice.others)
            doubt = self._publish(manifest) if choice.files else None
        except Exception as caught:
            error = caught.with_traceback(None)
            return Verdict(Failure(f"rank 0 could not publish it: {error}", (0,)), error)
        durable.crash_point("published")
        if doubt is None:
            # Before the others hear of it: afterwards they may be writing the next save into what is removed here.
            self._target.tidy(manifest)
        elif not self._target.names_late:  # else the files get their names all the same
            text = f"it is a checkpoint, but not all of it is certain to last: {doubt}"
            return Verdict(Failure(text, (0,), stands=True), doubt)
        self._doubt, self._is_empty = doubt, choice.is_empty
        elsewhere = {node: [dataclasses.asdict(file) for file in files] for node, files in choice.elsewhere.items()}
        more = {"sequence": sequence, "files": elsewhere, "dropped": choice.dropped, "slowest": self._slowest}
        more |= {"all_ranks": {"bytes_total": manifests.bytes_of(manifest), **self._cost}}
        return Verdict(more=more | ({"manifest": manifest.to_json().decode()} if self._target.spread else {}))

    def _note_cost(self, answers: Answers) -> None:
        """Each rank tells seconds of its own clock, so clocks need not agree."""
        flushed = [answer["flushed_s"] for answer in answers]
        self._slowest = flushed.index(max(flushed))
        blocked_s = max(answer["blocked_s"] for answer in answers)
        self._cost = {"blocked_s": round(blocked_s, 6), "flushed_s": round(max(flushed), 6)}

    def _publish(self, manifest: Manifest) -> Exception | None:
        """Returns what went wrong although the manifest has its name: it is decided, but may not last."""
        try:
            self._target.decide(manifest)
        except Exception as error:
            if not self._target.stands(manifest, error):
                raise
            return error.with_traceback(None)
        return None

    # ---- the round after it, if each node has a directory of its own -------------------------------------------------

    def _spread(self, said: Mapping[str, Any]) -> None:
        """
        Args:
            said: what rank 0 told when it had decided.
        """
        error: BaseException | None = None
        if self._conversation.rank != 0 and self._target.leads:
            try:
                manifest = manifests.parse(said["manifest"].encode())
                self._target.decide(manifest)
                self._target.tidy(manifest)
            except Exception as caught:
                error = caught.with_traceback(None)
            durable.crash_point("spread")
        hooks = {"also": self._say_failure, "heard": self._hear_bypass}
        self._round("spread", **hooks).hold(self._answer(error), error, lambda _: Verdict())

    def _say_failure(self, failure: Failure | None, answers: Answers) -> Mapping[str, Any]:
        """All else has been said before."""
        return {} if failure is None else self._say_bypass(failure, answers)

    # ---- the rounds after it, if names are late --------------------------------------------------------------------

    def _name_late(self, said: Mapping[str, Any]) -> None:
        """
        Args:
            said: what rank 0 told when it had decided.
        """
        error = self._name_files(said)
        self._round("placed", answered=self._note_all_placed).hold(self._answer(error), error, lambda _: self._finish())
        if self._target.node:
            error = self._point_latest_on_node(said)
            self._round("pointed").hold(self._answer(error), error, lambda _: Verdict())

    def _answer(self, error: BaseException | None) -> dict[str, Any]:
        return answer_for(self._call.what, error)

    def _name_files(self, said: Mapping[str, Any]) -> BaseException | None:
        dropped = set(said["dropped"])
        for file, entry in self._listed:
            if entry.temporary in dropped:
                file.file.undecided = False
                file.file.discard()
        try:
            if self._conversation.rank != 0 and self._target.leads:  # on a node with a directory of its own
                files = manifests.parse_files(said["files"].get(self._target.node, []))
                if files:
                    self._target.decide(self._manifest(said["sequence"], files))
            self._target.name_after([entry for _, entry in self._listed if entry.temporary not in dropped])
        except Exception as caught:
            return caught.with_traceback(None)
        durable.crash_point("placed")
        return None

    def _note_all_placed(self) -> None:
        if self._conversation.rank == 0:
            durable.crash_point("all-placed")

    def _finish(self) -> Verdict:
        """On rank 0."""
        if self._doubt is not None:
            text = f"it may not survive a crash of the system: {self._doubt}"
            return Verdict(Failure(text, (0,), stands=True), self._doubt)
        try:
            if not self._is_empty:
                self._target.point_latest()
        except Exception as caught:
            error = caught.with_traceback(None)
            return Verdict(Failure(f"it is a checkpoint, but `latest` was not moved: {error}", (0,), stands=True), error)
        return Verdict()

    def _point_latest_on_node(self, said: Mapping[str, Any]) -> BaseException | None:
        if self._conversation.rank != 0 and said["files"].get(self._target.node):
            try:
                self._target.point_latest()
            except CheckpointError as caught:
                return caught.with_traceback(None)
        return None
