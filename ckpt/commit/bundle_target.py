"""A bundle as a PublicationTarget: it may replace files, so these get their own names when the manifest has been published."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ckpt.commit.conversation import Failure
from ckpt.commit.replica_check import Digest, digest_of, without_numbers
from ckpt.commit.rounds import Ask
from ckpt.commit.target import Choice, Prepared, SaveCall, SavedFile
from ckpt.directory import bundles
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import BundleRoot
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.errors import CheckpointError, StorageError
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.storage import durable


@dataclasses.dataclass(frozen=True)
class BundleTarget:
    """See the module, and directory/bundles.py.

    Attributes:
        name: of the directory, as `latest` gives it.
        root: None on ranks that publish nothing.
        rank: this process's.
        varying: keys of integers in which files of the same name may differ.
        held: the directory, if it is there: all goes there, although a framework may rename it meanwhile.
        final: what it is called once all files have their names, see directory/late_names.py. None: it is already.
    """

    call: SaveCall
    name: str
    root: BundleRoot | None
    node: str
    move_latest: bool
    rank: int
    varying: tuple[str, ...] = ()
    held: durable.Directory | None = None
    final: Path | None = None
    names_late: ClassVar[bool] = True
    spread: ClassVar[bool] = False

    @property
    def leads(self) -> bool:
        return self.root is not None

    # ---- every rank ------------------------------------------------------------------------------------------------

    def name_now(self, file: SavedFile) -> Sequence[FileEntry]:
        """What lies elsewhere gets its name with the others, but no manifest lists it."""
        if not self._is_inside(file):
            return ()
        job = file.file.job
        details = (file.file.target.name, job.size, job.crc32, file.kind, self.rank, file.file.temporary.name)
        return (FileEntry(*details, **file.file.shared()),)

    def _is_inside(self, file: SavedFile) -> bool:
        return file.file.target.parent == self.call.directory

    def describe(self, files: tuple[FileEntry, ...]) -> Prepared:
        inside = [file.file for file in self.call.files if self._is_inside(file)]
        return Prepared(files, tuple(structure_digest(file, self.varying) for file in inside), node=self.node)

    def reply(self, question: Mapping[str, Any]) -> str:
        """Nothing is asked."""
        return ""

    def undo(self, file: SavedFile, by_all: bool) -> None:
        file.file.undecided = False

    def path(self) -> Path:
        now = self.call.directory if self.held is None else self.held.now()
        return self.final if self.final is not None and now == self.call.directory else now

    def name_after(self, files: Sequence[FileEntry]) -> None:
        bundles.give_final_names(self._reach, files)
        for file in self.call.files:
            if not self._is_inside(file):
                durable.rename_durably(file.file.reach(file.file.temporary), file.file.reach(file.file.target))

    @property
    def _reach(self) -> Path:
        """The directory, whatever it is called by now."""
        return self.call.directory if self.held is None else self.held.reach

    # ---- who leads -------------------------------------------------------------------------------------------------

    def choose(self, answers: Sequence[Prepared], ask: Ask) -> Choice | Failure:
        if not self.node and (elsewhere := [rank for rank, answer in enumerate(answers) if answer.node]):
            return Failure(f"rank {elsewhere[0]} saves by way of its node, and rank 0 straight home", tuple(elsewhere))
        files: dict[str, list[FileEntry]] = {}
        dropped: list[str] = []
        for node in dict.fromkeys(answer.node for answer in answers):
            files[node], unwanted = one_of_each([answer for answer in answers if answer.node == node])
            dropped += [file.temporary for file in unwanted]
        own = files.pop(self.node, [])
        return Choice(tuple(own), elsewhere=files, dropped=dropped)

    def take_sequence(self) -> int:
        assert self.root is not None
        return self.root.take_sequence()

    def decide(self, manifest: Manifest) -> None:
        assert self.root is not None
        self.root.publish(self._reach, manifest, self.call.directory)

    def stands(self, manifest: Manifest, error: Exception) -> bool:
        return isinstance(error, StorageError) and manifests.stands(manifest, self._reach)

    def tidy(self, manifest: Manifest) -> None:
        """Who has given the names removes what is old."""

    def point_latest(self) -> None:
        if self.final is not None and self.root is not None and not self._is_at(self.final):
            self.root.give_name(self.name)
            if self.held is not None and not self._is_at(self.final):
                text = f"'{self.final}' did not get its name: '{self.call.directory}' was removed or renamed meanwhile"
                raise StorageError(errno.ENOENT, text, str(self.final))
        if self.move_latest and self.root is not None:
            self.root.point_latest(self.name if self.held is None else self.root.name_of(self.held, self.name))

    def end(self) -> None:
        """Whatever has become of it, another one of this name may be begun now."""
        if self.final is not None and self.root is not None:
            undecided = any(each.file.undecided for each in self.call.files)  # then rank 0 knows whether it is a checkpoint
            self.root.end_partial(self.name, drop=not undecided)

    def _is_at(self, path: Path) -> bool:
        """Who looked for bundles may have been here before us."""
        return self.held is not None and self.held.is_at(path)


def one_of_each(answers: Sequence[Prepared]) -> tuple[list[FileEntry], list[FileEntry]]:
    """Of what ranks have written each name once: the files of the lowest rank that has written it, and the others.

    Raises:
        CheckpointError: two ranks have written a file, and its structure differs.
    """
    chosen: dict[str, tuple[FileEntry, Digest]] = {}
    dropped = []
    for answer in answers:
        for file, digest in zip(answer.files, answer.digests, strict=True):
            name = file.called or file.name
            first, expected = chosen.setdefault(name, (file, digest))
            if first.rank != file.rank:
                if digest != expected:
                    raise CheckpointError(
                        f"ranks {first.rank} and {file.rank} both write '{name}', and not the same: its structure, its "
                        "values beside tensors or the sizes of its tensors differ. Let one rank write it, or use two names"
                    )
                dropped.append(file)
            elif first is not file:  # written again by the same rank
                dropped.append(first)
                chosen[name] = file, digest
    return [file for file, _ in chosen.values()], dropped


def structure_digest(file: FileInFlight, varying: Sequence[str]) -> Digest:
    """What one_of_each() compares; the structure is forgotten.

    Args:
        varying: keys of integers that may differ.
    """
    digest = digest_of(without_numbers(file.pickle, varying), file.sizes, 0)
    file.forget_structure()
    return digest
