"""Carries one checkpoint from home to an object store, and commits it there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Container

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry
from ckpt.drain.journal import Journal, Progress
from ckpt.drain.node import Generation
from ckpt.drain.pacing import Pace
from ckpt.drain.stopping import Stop, StoppedError
from ckpt.errors import CheckpointError, CorruptError
from ckpt.remote.layout import Catalogue, Listing, RemoteCopy, move_latest, new_folder, remove_folder, sequence_in
from ckpt.remote.ownership import Ownership
from ckpt.storage import durable
from ckpt.storage.object_store import ObjectStore, ObjectStoreError
from ckpt.storage.stores import StoredObject

logger = logging.getLogger("ckpt")

_FILES_AT_ONCE = 4
_LOOK_S = 0.05
_NOTE_EVERY_S = 1.0


class SharedPace:
    """A Pace for several threads."""

    def __init__(self, pace: Pace, stop: Stop) -> None:
        self._pace = pace
        self._stop = stop
        self._lock = threading.Lock()

    def wait(self, size: int) -> float:
        """Until so many bytes more may go on their way; returns for how many seconds.

        Raises:
            StoppedError: the drain was asked to end.
        """
        began = time.monotonic()
        with self._lock:
            self._pace.wait(size)
        if self._stop.requested:
            raise StoppedError("the drain was asked to end")
        return time.monotonic() - began

    def note(self, size: int, seconds: float) -> None:
        """See Pace."""
        with self._lock:
            self._pace.note(size, seconds)


class Upload:
    """Of one generation. What it has done is noted in the journal, file by file: another process goes on there.

    Args:
        journal: its `inbox` is the folder in the store.
    """

    def __init__(
        self, store: ObjectStore, generation: Generation, journal: Journal, pace: Pace, stop: Stop, *, direct: bool
    ) -> None:
        self._store = store
        self._generation = generation
        self._journal = journal
        self._pace = SharedPace(pace, stop)
        self._stop = stop
        self._direct = direct
        self._lock = threading.Lock()  # guards the journal and the next two
        self._sent = 0  # since the last note
        self._noted_at = time.monotonic()
        manifest = generation.manifest
        if not journal.inbox:
            journal.inbox = new_folder(manifest.step, manifest.sequence)
            journal.files.clear()
        journal.total = manifests.bytes_of(manifest)
        journal.bytes = sum(file.bytes for file in manifest.files if self._is_there(file))

    def _is_there(self, file: FileEntry) -> bool:
        return self._journal.files.get(file.name, Progress()).finished

    def carry(self) -> None:
        """All files that are not there yet.

        Raises:
            CorruptError: a file at home is damaged; nothing of it is in the store.
            ObjectStoreError: the store refuses, or does not answer.
            StorageError: a file at home cannot be read.
            StoppedError: the drain was asked to end.
        """
        self._journal.write()
        left = [file for file in self._generation.manifest.files if not self._is_there(file)]
        if not left:
            return
        at_once = min(_FILES_AT_ONCE, len(left))
        with concurrent.futures.ThreadPoolExecutor(at_once, "ckpt-upload") as pool:
            futures = [pool.submit(self._put, file, at_once) for file in left]
            try:
                while concurrent.futures.wait(futures, _LOOK_S, concurrent.futures.FIRST_EXCEPTION).not_done:
                    if self._stop.requested or any(each.done() and each.exception() is not None for each in futures):
                        break  # a signal is heard between two looks
            finally:
                for each in futures:
                    each.cancel()  # those that have begun go on to their end
        self._raise_first(futures)

    def _raise_first(self, futures: list[concurrent.futures.Future[None]]) -> None:
        errors = [each.exception() for each in futures if not each.cancelled()]
        found = [error for error in errors if error is not None]
        for error in sorted(found, key=lambda error: isinstance(error, StoppedError)):
            raise error
        if any(each.cancelled() for each in futures):
            raise StoppedError("the drain was asked to end")

    def _put(self, file: FileEntry, share: int) -> None:
        """
        Args:
            share: how many files go at the same time.
        """
        source = self._generation.directory / file.name
        began, sent = time.monotonic(), 0

        def before(size: int) -> None:
            nonlocal began, sent
            began += self._pace.wait(size)
            sent += size
            self._note(size)
            durable.crash_point("upload-chunk")

        try:
            durable.refuse_irregular(source, "copy")
            key = f"{self._journal.inbox}/{file.name}"
            size = self._store.put_file(key, source, file.crc32, direct=self._direct, share=share, before=before)
            if size != file.bytes:
                raise CorruptError(f"'{source}' has {size} bytes where {file.bytes} were expected")
        except BaseException:
            self._note(-sent)
            raise
        self._pace.note(size * share, time.monotonic() - began)  # as a whole: chunks are taken long before they have arrived
        with self._lock:
            self._journal.files[file.name] = Progress(file.bytes, file.crc32, file.crc32, finished=True)
            self._journal.write()
        durable.crash_point("upload-file")

    def _note(self, size: int) -> None:
        with self._lock:
            self._journal.bytes += size
            self._sent += max(0, size)
            now = time.monotonic()
            if now - self._noted_at >= _NOTE_EVERY_S:
                self._journal.rate = self._sent / (now - self._noted_at)
                self._sent, self._noted_at = 0, now
                self._journal.write()

    def commit(self, ownership: Ownership) -> None:
        """Makes it a checkpoint in the store; an end between any two steps leaves the state named on the right.

            1. look whether the place is still ours        no checkpoint: no manifest
            2. look whether all files are there            no checkpoint
            3. create manifest.json                        a checkpoint; if it is there already and equal, it was us
            4. move `latest`                               the newest by name, too

        Raises:
            OwnedByAnotherError: another home has taken the place.
            ObjectStoreError: the store does not answer; another attempt does all of it again.
            StorageError: files that were carried are gone: they are carried again.
            CheckpointError: another manifest is there.
        """
        folder = self._journal.inbox
        ownership.expect()
        self._expect_files(folder)
        durable.crash_point("upload-complete")
        key = f"{folder}/{manifests.NAME}"
        if not self._store.create(key, self._generation.content):
            raise CheckpointError(f"'{self._store.url}/{key}' is there, and is another one; somebody else writes there")
        durable.crash_point("upload-committed")
        move_latest(self._store, folder)

    def _expect_files(self, folder: str) -> None:
        there = {each.key.rpartition("/")[2]: each.bytes for each in self._store.list(f"{folder}/")}
        lost = [file.name for file in self._generation.manifest.files if there.get(file.name) != file.bytes]
        if lost:
            for name in lost:
                self._journal.files.pop(name, None)
            self._journal.write()
            raise ObjectStoreError(
                0, f"'{self._store.url}/{folder}' lacks {', '.join(lost[:3])}, which was put there; it is put there again"
            )


def tidy_store(
    store: ObjectStore,
    catalogue: Catalogue,
    keep: int | None,
    back: Container[int],
    on_their_way: set[str],
    warn_once: Callable[[str], None],
) -> Listing:
    """Removes checkpoints beyond `keep`, and what was given up. The place is ours. What cannot be removed is told once.

    Args:
        back: sequences that jobs have gone back to: these stay, beside `keep`.
        on_their_way: folders that are being filled.

    Raises:
        ObjectStoreError: the store cannot be listed.
    """
    listing = catalogue.find()
    beyond = [copy.folder for copy in listing.copies[keep:] if copy.sequence not in back] if keep is not None else []
    newest = listing.copies[0].sequence if listing.copies else -1
    bare = [
        folder
        for folder, objects in listing.objects.items()
        if folder not in on_their_way and sequence_in(folder) <= newest and not _has_manifest(objects)
    ]
    removed: set[str] = set()
    for folder in (*reversed(beyond), *bare):
        try:
            remove_folder(store, folder, listing.objects[folder])
            removed.add(folder)
            durable.crash_point("upload-removed")
        except ObjectStoreError as error:
            warn_once(f"removing '{store.url}/{folder}' failed, all checkpoints are good: {error}")
    left: list[RemoteCopy] = [copy for copy in listing.copies if copy.folder not in removed]
    return listing._replace(copies=left)


def _has_manifest(objects: list[StoredObject]) -> bool:
    return any(each.key.endswith(f"/{manifests.NAME}") for each in objects)


def is_gone(generation: Generation) -> bool:
    """Whether its checkpoint was removed, or saved again: then its files are others, or none."""
    with contextlib.suppress(OSError):
        return (generation.directory / manifests.NAME).read_bytes() != generation.content
    return True
