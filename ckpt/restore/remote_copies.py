"""What of the checkpoints lies in an object store, and how a rank reads it there.

Rank 0 looks which manifests are there. A checkpoint in the store is a candidate like any other; of one that lies in several
places the store is the last from which a file is read. What a rank needs is fetched as nodes fetch from each other: whole files
are compared with the manifest before anybody reads them, and who reads parts of one verifies each piece.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.directory.run_file import find_run
from ckpt.drain import remote_place
from ckpt.errors import CheckpointError, NotACheckpointError, StorageError
from ckpt.remote.download import Expected, download, download_ranges
from ckpt.remote.layout import Catalogue, RemoteCopy, read_manifest
from ckpt.remote.ownership import find_owner
from ckpt.restore.candidates import Candidate
from ckpt.restore.fetching import Commit, directory_of
from ckpt.restore.lone_writer import lone_writer
from ckpt.restore.places import Ranges, same_content
from ckpt.storage import durable, scratch
from ckpt.storage.object_store import ObjectStore

logger = logging.getLogger("ckpt")

LABEL = "object store"


class RemoteCopies:
    """Of one Checkpointer.

    Args:
        place: what home has of the store, see ckpt/drain/remote_place.py; need not be there.
        find_shared: the directory on the disk of this node where ranks share what they fetch; None: there is none.
        scratch: where each has a directory of its own then; None: that of temporary files.
        timeout_s: how long a rank waits for another one that fetches the same.

    Attributes:
        owner: on rank 0, whose the place in the store is, as the last look has found; empty: nobody's, or nobody has looked.
    """

    def __init__(
        self,
        store: ObjectStore,
        place: Path,
        rank: int,
        find_shared: Callable[[], Path | None],
        scratch: Path | None,
        timeout_s: float,
    ) -> None:
        self._store = store
        self._place = place
        self._catalogue = Catalogue(store)
        self._rank = rank
        self._find_shared = find_shared
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._own: Path | None = None  # a directory of this rank alone, once there is one
        self._made: list[Path] = []
        self.owner = ""

    def look(self, instead: str) -> tuple[list[RemoteCopy], list[str]]:
        """On rank 0: the checkpoints there, newest first; and what is wrong with those that cannot be understood.

        Nothing if they are another home's, unless this one has no checkpoints: it may be the new home of a job that has lost
        its own. Else numbers of commits, which tell what is newer, would be compared that have nothing to do with each other.

        Args:
            instead: from what the job resumes if nothing is found there; empty: there is nothing.

        Raises:
            StorageError: it does not answer, and there is nothing: the job must not begin anew because of that.
            CorruptError: whose it is cannot be told, and there is nothing.
        """
        try:
            listing = self._catalogue.find()
            self.owner, home = find_owner(self._store)
        except StorageError as error:
            if not instead:
                text = f"there is no checkpoint elsewhere, and whether the object store has one cannot be told: {error}"
                raise StorageError(error.errno or 0, text, error.filename) from error
            return self._left_out(error, instead)
        except CheckpointError as error:
            if not instead:
                raise
            return self._left_out(error, instead)
        if instead and self.owner and not self._is_ours(self.owner, home):
            self.owner = ""
            text = (
                "'%s' holds checkpoints of another home: they are left out of this restore, which resumes %s. To go on from "
                "there, give a directory without checkpoints; else give Tier.remote() a URL of its own"
            )
            logger.warning(text, self._store.url, instead)
            return [], []
        for text in listing.damaged:
            logger.warning("a damaged checkpoint is passed over: %s", text)
        return listing.copies, listing.damaged

    def _left_out(self, error: CheckpointError, instead: str) -> tuple[list[RemoteCopy], list[str]]:
        logger.warning("what lies in the object store is left out of this restore, which resumes %s: %s", instead, error)
        return [], []

    def mention(self) -> str:
        """On rank 0, behind a text that says what to remove: what is restored then. Empty if there is nothing."""
        try:
            copies = self._catalogue.find().copies
        except CheckpointError as error:
            return f". Whether '{self._store.url}' has an older one cannot be told: {error}"
        if not copies:
            return ""
        return f". After that restore() takes what '{self._store.url}' has: step {copies[0].manifest.step} is the newest there"

    def _is_ours(self, owner: str, home: str) -> bool:
        """Whether it is this home's, or that of the one whose place it is about to take over."""
        here = remote_place.home_of(self._place)
        run = None
        with contextlib.suppress(CheckpointError):  # whoever needs that name says what is wrong with it
            run = find_run(here)
        remote = remote_place.read_if_any(self._place)
        if remote is None:
            # Lost with a home that was made anew from its nodes: the store knows it by the name of its run. One that was
            # entered before there were nodes is known by its path.
            return run is not None and (owner == run or home == str(here))
        taken = remote_place.was_taken(self._place, remote.ticket)
        return owner in ({remote.owner, run} if taken else {remote.owner, run, remote.instead_of})

    def place_of(self, candidate: Candidate) -> StorePlace:
        """Of one that lies in the store."""
        base = self._base()
        directory = directory_of(base, Commit(candidate.sequence, candidate.identity))
        directory = directory.with_name(f"{directory.name}-store")  # what came from a node may be damaged
        self._made.append(directory)
        return StorePlace(self._store, candidate, directory, self._rank, self._timeout_s)

    def _base(self) -> Path:
        shared = self._find_shared() if self._scratch is None else None
        if shared is not None and shared.is_dir():
            return shared
        if self._own is None:
            self._own = scratch.make_private_directory(self._scratch)
        return self._own

    def end(self) -> None:
        """Of a restore: every rank has read what it needs."""
        own, self._own = self._own, None
        for path in (*self._made, *([] if own is None else [own])):
            scratch.remove(path)
        self._made.clear()


class StorePlace:
    """A Place: see places.py.

    Args:
        directory: to which files are fetched.
    """

    def __init__(self, store: ObjectStore, candidate: Candidate, directory: Path, rank: int, timeout_s: float) -> None:
        self._store = store
        self._folder = candidate.remote
        self._directory = directory
        self._rank = rank
        self._timeout_s = timeout_s
        self._manifest: Manifest | None = None

    def manifest(self) -> Manifest | None:
        if self._manifest is None:
            self._manifest = read_manifest(self._store, self._folder)
        return self._manifest

    def find(self, entry: FileEntry, ranges: Ranges | None) -> tuple[Path, str] | None:
        """
        Raises:
            CorruptError: it is damaged there.
            StorageError: it cannot be fetched.
        """
        manifest = self.manifest()
        if manifest is None:
            raise NotACheckpointError(f"'{self._store.url}/{self._folder}' has just been removed")
        key = f"{self._folder}/{same_content(manifest, entry)}"
        path = self._whole(entry, key) if ranges is None else self._ranges(entry, key, ranges)
        logger.info("'%s' was fetched from '%s/%s'", path, self._store.url, key)
        return path, LABEL

    def _whole(self, entry: FileEntry, key: str) -> Path:
        path = self._directory / entry.name
        with lone_writer(path, self._timeout_s):
            if not os.path.lexists(path):
                with scratch.new_file(path) as file:
                    download(self._store, Expected(key, entry.bytes, entry.crc32), lambda _, chunk: file.write(chunk))
        return path

    def _ranges(self, entry: FileEntry, key: str, ranges: Ranges) -> Path:
        path = self._directory / f"{entry.name}.of-{self._rank:05d}"
        durable.make_directory(self._directory, durable=False)
        with scratch.new_file(path) as file:
            file.grow(entry.bytes)

            def put(begin: int, chunk: memoryview) -> None:
                file.seek(begin)
                file.write(chunk)

            download_ranges(self._store, key, ranges, put)
        return path

    def give_up(self, entry: FileEntry, path: Path) -> bool:
        """See DirectoryPlace."""
        return False


def with_remote(
    candidates: Sequence[Candidate], at_home: Mapping[int, str], copies: Sequence[RemoteCopy], collective: bool
) -> list[Candidate]:
    """Newest commit first. Of two commits with one number home's counts.

    Args:
        at_home: sequences, and their identities.
        collective: whether what is replicated is read by all ranks together.
    """
    folders: dict[tuple[int, str], RemoteCopy] = {}
    for copy in copies:
        folders.setdefault((copy.sequence, manifests.identity(copy.manifest)), copy)
    found = []
    for candidate in candidates:
        identity = candidate.identity or at_home.get(candidate.sequence, "")
        there = folders.get((candidate.sequence, identity))
        found.append(candidate if there is None else candidate._replace(nearest=True, identity=identity, remote=there.folder))
    known = {(candidate.sequence, candidate.identity) for candidate in found}
    for (sequence, identity), copy in folders.items():
        if (sequence, identity) not in known and at_home.get(sequence, identity) == identity:
            together = collective and any(file.kind == REPLICATED for file in copy.manifest.files)
            name = copy.folder.partition("/")[0]
            found.append(Candidate(name, sequence, together, True, identity, (), copy.folder))
    return sorted(found, key=lambda candidate: candidate.sequence, reverse=True)
