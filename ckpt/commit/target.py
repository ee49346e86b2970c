"""PublicationTarget: what publishing a save needs of a directory of steps, or of bundles."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ckpt.commit.conversation import Failure
from ckpt.commit.layout_exchange import LayoutWord
from ckpt.commit.replica_check import Digest
from ckpt.commit.rounds import Ask
from ckpt.commit.shared_file import WrittenShare
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import RANK, FileEntry, Manifest
from ckpt.saving.file_in_flight import FileInFlight


@dataclasses.dataclass(frozen=True)
class SavedFile:
    """One file of a save, as far as this rank is concerned."""

    file: FileInFlight
    kind: str = RANK  # as in the manifest
    written: bool = True  # by this rank, or its share of it; else it is only compared
    apart: bool = False  # it has the frozen tensors of another one

    @property
    def is_shared(self) -> bool:
        """All ranks write it together, and rank 0 gives it its name."""
        return self.file.write_share is not None


@dataclasses.dataclass(frozen=True)
class SaveCall:
    """One call of save(), the same on all ranks but for the files.

    Attributes:
        number: of the call.
        step: goes into the manifest.
        what: is saved, in words that are the same on all ranks.
        where: it is saved to, for errors.
        directory: of the checkpoint.
        bundle, moves_latest, metrics: see Manifest.
    """

    number: int
    step: int
    what: str
    where: Path
    directory: Path
    files: tuple[SavedFile, ...] = ()
    bundle: str = ""
    moves_latest: bool = True
    metrics: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a rank says of its files when they are durable.

    Attributes:
        digests: of what is to be the same on several ranks.
        shares: of the files that all ranks write together.
        layout: of what it has written of a sharded state.
        node: see PublicationTarget.
    """

    files: tuple[FileEntry, ...] = ()
    digests: tuple[Digest, ...] = ()
    shares: tuple[WrittenShare, ...] = ()
    layout: LayoutWord | None = None
    node: str = ""

    def to_message(self) -> dict[str, Any]:
        said = dataclasses.asdict(self)
        if self.layout is None:
            del said["layout"]
        return said

    @staticmethod
    def parse(said: Mapping[str, Any]) -> Prepared:
        files = manifests.parse_files(said["files"])
        digests = tuple(Digest(**digest) for digest in said["digests"])
        shares = tuple(WrittenShare(**share) for share in said["shares"])
        layout = said.get("layout")
        return Prepared(files, digests, shares, LayoutWord(**layout) if layout else None, said["node"])


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes the checkpoint, of all that the ranks have written.

    Attributes:
        files: of the manifest that rank 0 writes.
        others: see Manifest.
        elsewhere: by node, the files of manifests in directories that rank 0 does not see.
        dropped: the names that files that are not wanted have now.
    """

    files: tuple[FileEntry, ...]
    others: tuple[str, ...] = ()
    elsewhere: Mapping[str, Sequence[FileEntry]] = dataclasses.field(default_factory=dict)
    dropped: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        return not self.files and not any(self.elsewhere.values())


class PublicationTarget(Protocol):
    """Where one save is published.

    Attributes:
        names_late: False: files get their own names before a manifest lists them. True: afterwards, because they may replace
            files that are in use; until then the manifest gives their temporary names, too.
        spread: whether each node has a directory of its own, and gets the whole manifest there. Not if names are late.
        node: names the directory tree that this rank sees; the same on all ranks if they share one.
        leads: whether this rank writes a manifest: rank 0, and one rank of each other node.
    """

    @property
    def call(self) -> SaveCall: ...

    @property
    def names_late(self) -> bool: ...

    @property
    def spread(self) -> bool: ...

    @property
    def node(self) -> str: ...

    @property
    def leads(self) -> bool: ...

    # ---- every rank ------------------------------------------------------------------------------------------------

    def name_now(self, file: SavedFile) -> Sequence[FileEntry]:
        """What a manifest will say of a file that is durable. Unless names are late, this gives it its own, durably.

        Empty: this rank has nothing to say of it. Several: it has written others that belong to it.
        """

    def describe(self, files: tuple[FileEntry, ...]) -> Prepared:
        """
        Args:
            files: from name_now().
        """

    def reply(self, question: Mapping[str, Any]) -> str:
        """What choose() asks on rank 0."""

    def undo(self, file: SavedFile, by_all: bool) -> None:
        """Takes a file back that will not be published.

        Args:
            by_all: all ranks do. Else rank 0 may still be busy with what all write together.
        """

    def path(self) -> Path:
        """The directory of the checkpoint, whatever it is called by now."""

    # ---- who leads -------------------------------------------------------------------------------------------------

    def choose(self, answers: Sequence[Prepared], ask: Ask) -> Choice | Failure:
        """On rank 0; Failure: what the ranks have written does not make a checkpoint."""

    def take_sequence(self) -> int:
        """The number of the next commit."""

    def decide(self, manifest: Manifest) -> None:
        """Writes the manifest: then the files are a checkpoint."""

    def stands(self, manifest: Manifest, error: Exception) -> bool:
        """Whether the files are a checkpoint although decide() ended with this error."""

    def tidy(self, manifest: Manifest) -> None:
        """Removes what the checkpoint has made superfluous. Raises nothing."""

    def point_latest(self) -> None:
        """Moves `latest`, if decide() has not done so. Called when all files have their names."""

    # ---- every rank, if names are late -----------------------------------------------------------------------------

    def name_after(self, files: Sequence[FileEntry]) -> None:
        """Gives files that a manifest lists their own names, durably, and those that no manifest lists."""
