"""Copies checkpoints of a directory to an object store, as the drain of a tier carries them: verified, the manifest last.

How far each has come is noted where the drain of that tier notes it, in .remote of the directory. So an interrupted copy goes
on where it ended, and a job of this directory that is given a tier of the same URL finds the place its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import committed_deeper_in
from ckpt.directory.step_names import is_step_name
from ckpt.drain import journal as journals
from ckpt.drain import node as nodes
from ckpt.drain import remote_place
from ckpt.drain.journal import COMMITTED, COPYING, FAILED, Journal
from ckpt.drain.node import Generation, Generations, still_there
from ckpt.drain.remote_place import Remote
from ckpt.drain.stopping import Stop, StoppedError
from ckpt.drain.upload import Upload
from ckpt.errors import CheckpointError, StorageError, UnsupportedError
from ckpt.remote.layout import Catalogue, Listing, RemoteCopy
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.object_store import ObjectStore
from ckpt.storage.object_urls import parse_url
from ckpt.upkeep.census import missing_objects, none_at
from ckpt.upkeep.copying import COPIED, THERE, Copied, Told

_IN_USE = "'{directory}' is being worked on by {holder}: it carries checkpoints there itself; wait for it, or end it"


def find_generations(source: Path) -> tuple[Path, list[Generation]]:
    """The directory to which it belongs; and a step, or all that are committed in a directory, in the order of their commits.

    Raises:
        NotACheckpointError: there is none.
        UnsupportedError: there are bundles: an object store holds steps.
        StorageError: it cannot be read.
    """
    alone = os.path.lexists(source / manifests.NAME)
    home = Path(os.path.abspath(source)).parent if alone else Path(os.path.abspath(source))
    if os.path.lexists(home / nodes.NAME):
        raise UnsupportedError(f"'{home}' is that of a run on a node: its drain carries what is there home; copy from home")
    if alone:
        names = [os.path.basename(os.path.abspath(source))]
    else:
        names = [os.path.relpath(path, source) for path, _ in committed_deeper_in(source)] if source.is_dir() else []
    bundles = [name for name in names if not is_step_name(name)]
    if bundles:
        text = f"'{home / bundles[0]}' is a bundle, and a place in an object store holds steps"
        raise UnsupportedError(f"{text}: copy it to a directory, or with the tools of the store")
    found = [each for each in Generations(home).find() if each.directory.name in names]
    if not found:
        raise none_at(source, "no checkpoint of this library")
    return home, found[::-1]


class StorePlace:
    """A place in an object store, and what a directory notes of it. A context manager: meanwhile no drain is at work there.

    Credentials come from the environment.

    Args:
        home: the directory.
        stop: ends a copy on its way.

    Raises:
        ValueError: the URL is impossible.
        InUseError: from entering: a drain is at work there.
        StorageError: it cannot be noted; or obstore is missing.
    """

    def __init__(self, home: Path, url: str, stop: Stop) -> None:
        self.url = str(parse_url(url))
        self._home = home
        self._stop = stop
        self._place = remote_place.place_of(home, self.url)
        self._lock = DirectoryLock(self._place, name=nodes.LOCK, refusal=_IN_USE, owner="another drain")

    def __enter__(self) -> StorePlace:
        known = remote_place.read_if_any(self._place)
        self._store = ObjectStore(self.url, {} if known is None else known.options)
        durable.make_directory(self._place / journals.FOLDER, durable=True)
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def copy(self, generations: list[Generation], told: Told = lambda _: None) -> Iterator[Copied]:
        """One after the other. What is there already is not copied again.

        Args:
            told: called with the bytes that go on their way.

        Raises:
            OwnedByAnotherError: the place belongs to another directory.
            CheckpointError: another checkpoint has the number of one of them, or one that is there has lost files: nothing
                was copied.
            CorruptError: a file is damaged; those before it are copied.
            StorageError: the store refuses, or does not answer; called again, it goes on there.
            StoppedError: it was asked to end.
        """
        remote = remote_place.read_if_any(self._place) or self._describe()
        ownership = remote_place.claim(self._place, remote, self._store)
        listing = Catalogue(self._store).find()
        there = {copy.sequence: copy for copy in listing.copies}
        self._refuse_others(generations, there)
        self._refuse_cut_off([copy for each in generations if (copy := there.get(each.sequence))], listing)
        for generation in generations:
            found = there.get(generation.sequence)
            total = manifests.bytes_of(generation.manifest)
            if found is not None:
                told(total)
                yield Copied(generation.directory.name, f"{self.url}/{found.folder}", total, THERE)
                continue
            journal = self._journal_of(generation)
            try:
                journal.change(COPYING, began=journal.began or time.time(), next=None, text="", errno=0)
                upload = Upload(self._store, generation, journal, _Unlimited(told), self._stop, direct=remote.direct_io)
                told(journal.bytes)
                upload.carry()
                upload.commit(ownership)
                journal.change(COMMITTED)
            except StoppedError:
                journal.write()
                raise
            except (CheckpointError, OSError) as error:
                self._note(journal, error)
                if not still_there(generation):
                    text = f"'{generation.directory}' was removed, or saved again, while it was being copied: {error}"
                    raise StorageError(getattr(error, "errno", None) or 0, text) from error
                raise
            yield Copied(generation.directory.name, f"{self.url}/{journal.inbox}", total, COPIED)

    def _describe(self) -> Remote:
        """As a tier would do it, of which no job has told yet."""
        remote = Remote(
            url=self.url,
            home=self._home,
            owner=remote_place.new_name(),
            instead_of="",
            ticket="",
            keep=None,
            every_steps=None,
            every_s=None,
            rate=None,
            direct_io=True,
            pace=self._place / remote_place.PACE,
            pids={},
            options={},
        )
        remote_place.write(self._place, remote)
        return remote

    def _refuse_others(self, generations: list[Generation], there: dict[int, RemoteCopy]) -> None:
        for each in generations:
            found = there.get(each.sequence)
            if found is not None and manifests.identity(found.manifest) != manifests.identity(each.manifest):
                raise CheckpointError(
                    f"'{self.url}/{found.folder}' has the same number of commit as '{each.directory}', and is another "
                    "checkpoint: which is newer could not be told there; copy to another URL"
                )

    def _refuse_cut_off(self, copies: list[RemoteCopy], listing: Listing) -> None:
        for copy in copies:
            if missing := missing_objects(copy.manifest, listing.objects[copy.folder]):
                raise CheckpointError(
                    f"'{self.url}/{copy.folder}' is there, but {len(missing)} of its {len(copy.manifest.files)} files are "
                    f"missing or cut off ({missing[0]}): remove that folder with the tools of the store, and copy again"
                )

    def _journal_of(self, generation: Generation) -> Journal:
        """It is not in the store, whatever was noted."""
        path = journals.path_of(self._place, generation.sequence)
        known = journals.read(path)
        if known is None or known.identity != generation.identity or known.state == COMMITTED:
            return Journal(path, generation.sequence, generation.manifest.step, generation.identity)
        known.ended, known.by = 0.0, 0
        return known

    def _note(self, journal: Journal, error: Exception) -> None:
        code = getattr(error, "errno", None) or 0
        journal.change(FAILED, attempts=journal.attempts + 1, next=None, errno=code, text=str(error))


class _Unlimited:
    """A Pace that says what is on its way."""

    def __init__(self, told: Callable[[int], object]) -> None:
        self._told = told

    def wait(self, size: int) -> None:
        self._told(size)

    def note(self, size: int, seconds: float) -> None:
        """Nobody asks."""


@contextlib.contextmanager
def told_to_stop(stop: Stop) -> Iterator[None]:
    """Meanwhile an interrupt ends a copy behind the chunks that are on their way, which is soon."""
    import signal

    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
