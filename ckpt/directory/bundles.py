"""A directory of bundles: checkpoints whose directories and files have names that a framework gives them.

    .lock                     held by the one job that writes here
    latest                    the name of the newest complete bundle; written last, without a line's end
    global_step42/
        manifest.json         the commit record
        <any name>            files of all ranks

The names are fixed, so a bundle that is saved again replaces files that are in use: all of them or none. New files keep their
temporary names until the manifest, which lists both names of each, is durable. That decides: from then on whoever finds a file
under its temporary name gives it its own, see complete(). The directory itself may get its name last, too: see late_names.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt.directory import late_names, publish_lock
from ckpt.directory import manifest as manifests
from ckpt.directory.listing import LATEST, newest_first, read_manifests
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.root import Root, has_size, temporaries_in
from ckpt.directory.step_names import is_step_name, names_in
from ckpt.errors import CheckpointError, CorruptError, InUseError, NotACheckpointError, StorageError
from ckpt.storage import durable, temporary_names
from ckpt.storage.directory_lock import NAME as LOCK

logger = logging.getLogger("ckpt")

_guard = threading.RLock()  # reentrant: a finalizer releases
_roots: dict[tuple[int, int, int], BundleRoot] = {}  # by process, device and inode; guarded by _guard


class BundleRoot:
    """What the job's rank 0 (or the first rank of a node that has a directory of its own) does in the directory.

    All of a process that save into one directory share it: a job may train several models.
    """

    def __init__(self, path: Path) -> None:
        # A framework may rename it as soon as it has given us its files.
        self._root = Root(path, follows=True)
        self._users = 0  # guarded by _guard
        self._partial: set[str] = set()  # names of bundles on their way that are to get them last; guarded by _guard

    @staticmethod
    def claim(path: Path, *, below: bool = True) -> BundleRoot:
        """Makes the directory ours, and removes what a crash left. Pair with release().

        Args:
            below: also in the directories in it. False: bundles get their names last, so nothing of ours is there; others may
                be saving in these.

        Raises:
            InUseError: another job is writing to it.
            StorageError: it cannot be made or locked.
        """
        with _guard:
            own = BundleRoot(path)
            own._root.make(synced=False)
            identity = own._root.identity  # it may have several names
            own = _roots.get(identity, own)
            if own._users == 0:
                own._root.claim()
                try:
                    own._begin(below)
                except BaseException:
                    own._root.release()
                    raise
                _roots[identity] = own
            own._users += 1
            return own

    def release(self) -> None:
        with _guard:
            self._users -= 1
            if self._users == 0:
                _roots.pop(self._root.identity, None)
                self._root.release()

    def is_at(self, path: Path) -> bool:
        """Whether the path still leads here."""
        return self._root.is_at(path)

    def name_of(self, directory: durable.Directory, name: str) -> str:
        """Of a bundle that was begun as `name`, for `latest`."""
        now = directory.now()
        if now == directory.path:
            return name
        root = Path(os.path.realpath(self._root.now()))
        return os.path.relpath(os.path.realpath(now), root) if now.is_relative_to(root) else name

    @contextlib.contextmanager
    def _publishing(self) -> Iterator[None]:
        """Meanwhile no drain commits here.

        Raises:
            InUseError: one does, for too long.
        """
        if not publish_lock.is_home(self._root.reach):
            yield
            return
        durable.make_directory(self._root.reach / publish_lock.FOLDER, durable=True)
        with publish_lock.publishing(self._root.reach, "job"):
            yield

    def _begin(self, below: bool) -> None:
        """Behind the claim, before a byte is written."""
        try:
            with self._publishing():
                self._remove_leftovers(below)
        except InUseError as error:
            logger.warning("what a crash has left in '%s' is not removed now: %s", self._root.path, error)
        if publish_lock.is_home(self._root.path):
            self.reserve_numbers(0)

    def _remove_leftovers(self, below: bool) -> None:
        """Of processes that are gone; and no file that a manifest names, as long as it could not be given its name."""
        path = self._root.path
        complete_all(path)
        late_names.settle(path)
        # What is behind a link is left alone: others may be writing there. So may drains in a directory of their own.
        found = _subdirectories(path) if below else []
        for directory in [path, *(each for each in found if not each.is_symlink() and each.name != publish_lock.FOLDER)]:
            try:
                self._remove_leftovers_in(directory)
            except (OSError, NotACheckpointError) as error:
                logger.warning("removing what a crash left in '%s' failed: %s", directory, error)

    def _remove_leftovers_in(self, directory: Path) -> None:
        wanted = _named_in(directory)
        for path, behind in temporaries_in(directory):
            if path.name in wanted or temporary_names.may_be_in_use(path.name) or not path.is_file():
                continue
            if directory != self._root.path or behind == LATEST:  # beside the bundles, others save files of their own
                durable.remove_file(path)

    def take_sequence(self) -> int:
        """The number of the next commit."""
        return self._root.take_sequence(lambda: committed_deeper_in(self._root.reach))

    def reserve_numbers(self, above: int) -> int:
        """From now on commits get numbers that nothing on a node has, see Root. Returns the one below the first.

        Args:
            above: the highest number that was come across elsewhere.

        Raises:
            CorruptError, StorageError: as of Root.reserve_numbers().
        """
        highest = max((manifest.sequence for _, manifest in committed_deeper_in(self._root.reach)), default=0)
        return self._root.reserve_numbers(max(above, highest))

    def publish(self, directory: Path, manifest: Manifest, called: Path) -> None:
        """Decides that the files, which are durable under their temporary names, are the bundle.

        Args:
            called: the directory, as a person knows it.

        Raises:
            CorruptError: one of the files is not there.
            StorageError: a system call failed.
            InUseError: the directory is not ours any more.
        """
        self._root.lock.assert_held()
        for file in manifest.files:
            if not has_size(directory / file.temporary, file.bytes):
                raise CorruptError(
                    f"'{called}' does not hold the {file.bytes} bytes of '{file.name}' that rank {file.rank} has written: "
                    "it was removed meanwhile, or not all ranks see the same directory"
                )
        self._root.sync()
        with self._publishing():
            durable.replace_durably(directory / manifests.NAME, manifest.to_json(), "manifest")

    def begin_partial(self, name: str) -> None:
        """Before anybody writes to the bundle, which is to get its name last. Pair with end_partial().

        Raises:
            InUseError: it is being saved already.
            StorageError: what is left of a former attempt cannot be removed, or what has the name is no directory.
        """
        late_names.refuse_obstacle(self._root.reach, name)
        with _guard:
            if name in self._partial:
                raise InUseError(f"'{self._root.path / name}' is being saved already: wait for that")
            partial = late_names.partial_of(self._root.reach, name)
            if (manifest := manifests.read_if_any(partial)) is not None:
                complete(partial, manifest)
            if os.path.lexists(partial):  # something newer has the name, or it was never complete
                durable.remove_tree(partial)
            self._partial.add(name)

    def end_partial(self, name: str, *, drop: bool) -> None:
        """
        Args:
            drop: what was written goes, unless it has become a checkpoint.
        """
        if drop:
            late_names.drop(late_names.partial_of(self._root.now(), name))
        with _guard:
            self._partial.discard(name)

    def give_name(self, name: str) -> None:
        """To a bundle that got none yet. Raises StorageError, InUseError."""
        self._root.lock.assert_held()
        root = self._root.reach
        with self._publishing():
            late_names.give_name(late_names.partial_of(root, name), root, name)

    def point_latest(self, name: str) -> None:
        """Raises StorageError, InUseError."""
        self._root.lock.assert_held()
        with self._publishing():
            self._root.point_latest(name)


def committed_in(root: Path) -> list[tuple[Path, Manifest]]:
    """The bundles that were published, newest first."""
    found = read_manifests(each for each in _subdirectories(root) if not late_names.is_replaced(each.name))
    return newest_first((path, said) for path, said in found if isinstance(said, Manifest))


def committed_deeper_in(root: Path) -> list[tuple[Path, Manifest]]:
    """Also those whose names have a slash: in directories that are no bundles, and in which no other job has a lock.

    Not what is on its way out, or on its way there.
    """
    found = [(path, manifest) for path, manifest in committed_in(root) if not temporary_names.is_temporary(path.name)]
    if os.path.lexists(root / LOCK):  # else no job has named anything from here
        for path in _subdirectories(root):
            other = path.name.startswith(".") or any(os.path.lexists(path / name) for name in (manifests.NAME, LOCK))
            below = () if other else committed_in(path)
            found += [each for each in below if not (each[0].name.startswith(".") or is_step_name(each[0].name))]
    return newest_first(found)


def remove_bundle(directory: Path) -> None:
    """The manifest last: what a crash leaves of it is damaged, and not something that this library has not written. A link goes
    as a link.

    Raises:
        StorageError: something is left.
    """
    failed: OSError | None = None
    for name in sorted(names_in(directory) - {manifests.NAME}) if not directory.is_symlink() else ():
        path = directory / name
        try:
            (durable.remove_tree if path.is_dir() else durable.remove_file)(path)
        except OSError as error:
            failed = failed or error
        durable.crash_point("removal-begun")
    if failed is not None:
        raise failed
    durable.remove_tree(directory)


def give_final_names(directory: Path, files: Sequence[FileEntry]) -> None:
    """Gives files their own names, durably.

    Raises:
        StorageError: a system call failed; complete() finishes it later.
    """
    for file in files:
        try:
            durable.give_name(directory / file.temporary, directory / file.name)
        except StorageError as error:
            # Somebody who read the manifest may have been here before us.
            if error.errno != errno.ENOENT or not has_size(directory / file.name, file.bytes):
                raise
    if files:
        durable.sync_directory(directory)


def complete(directory: Path, manifest: Manifest) -> None:
    """Finishes what a crash interrupted after the manifest was published.

    Raises:
        StorageError: a system call failed.
    """
    left = [file for file in manifest.files if file.temporary and (directory / file.temporary).exists()]
    if left:
        logger.info("'%s' is completed: %d files get their names", directory, len(left))
        give_final_names(directory, left)
    if (name := late_names.name_behind(directory.name)) is not None:
        late_names.give_name_left_over(directory, directory.parent, name)


def is_unsettled(directory: Path) -> bool:
    """Whether files that its manifest names are just getting their own names, as a living job gives them."""
    manifest = manifests.read_if_any(directory)
    return manifest is not None and any(file.temporary and (directory / file.temporary).exists() for file in manifest.files)


def complete_all(root: Path, name: str | None = None) -> None:
    """Where it can be done: who only reads may not be allowed to.

    Args:
        name: of one more, which may lie deeper.
    """
    found = dict(committed_in(root))
    if name is not None and (manifest := manifests.read_if_any(root / name)) is not None:
        found[root / name] = manifest
    for directory, manifest in found.items():
        try:
            complete(directory, manifest)
        except CheckpointError as error:
            logger.warning("completing '%s' failed: %s", directory, error)


def _named_in(directory: Path) -> set[str]:
    """The temporary names that its manifest gives.

    Raises:
        NotACheckpointError: there is one, and it cannot be read.
    """
    try:
        return {file.temporary for file in manifests.read(directory).files}
    except NotACheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return set()
        raise


def read_latest(root: Path) -> str | None:
    try:
        name = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return name or None


def _subdirectories(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return []
