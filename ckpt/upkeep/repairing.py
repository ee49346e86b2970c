"""What a crash has left in a directory of checkpoints, and what is to be done about it.

A crash may come between any two lines of a publication (directory/publishing.py, directory/bundles.py). Whatever it leaves, the
next job that saves there cleans up by itself; and it takes back what had not become a checkpoint. Who has no next job, or wants
to keep what was complete, repairs:

    a manifest was written, and has no name     finalised, once every byte of its files was found to be right
    files or the directory of a bundle          get the names that they were to have
    `latest`                                    names the newest checkpoint, if it names none, or an older step
    all else of saves that died                 is removed

Files that no save of this library is known to have left, and manifests that cannot be understood, are for a person to judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt.directory import late_names, publish_lock, sharded_files, unpublished
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import committed_deeper_in, committed_in, complete, read_latest
from ckpt.directory.listing import LATEST
from ckpt.directory.manifest import Manifest
from ckpt.directory.retention import unnamed_in
from ckpt.directory.root import temporaries_in
from ckpt.directory.step_names import is_step_name, names_in
from ckpt.drain import node as nodes
from ckpt.errors import CheckpointError, NotACheckpointError
from ckpt.storage import durable, temporary_names
from ckpt.storage.directory_lock import NAME as LOCK
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.upkeep.census import is_checkpoint
from ckpt.upkeep.prepared import Prepared, find_prepared
from ckpt.upkeep.verifying import GOOD, judge

FINALISE, NAME, MEND, REMOVE, LEAVE = "finalise", "name", "mend", "remove", "leave"


@dataclasses.dataclass(frozen=True)
class Action:
    """
    Attributes:
        do: one of the above; "leave": nothing, for a person to judge.
        why: in words.
        apply: does it, durably.
    """

    do: str
    path: Path
    why: str
    apply: Callable[[], None] = lambda: None


@contextlib.contextmanager
def alone_in(directory: Path, *, changing: bool) -> Iterator[None]:
    """Meanwhile no job saves there, and no drain publishes. Who changes nothing takes nothing, and only looks whether one does.

    Raises:
        InUseError: somebody else does.
        NotACheckpointError: there is no such directory, or it is none that can be repaired.
    """
    if not directory.is_dir():
        raise NotACheckpointError(f"'{directory}' is no directory")
    if os.path.lexists(directory / nodes.NAME):
        raise CheckpointError(f"'{directory}' is that of a run on a node: its drain, and the next job there, look after it")
    root = root_of(directory)
    lock = DirectoryLock(root, refusal=_IN_USE)
    if not changing:
        lock.expect_free(0.0)
        yield
        return
    lock.acquire()
    try:
        with contextlib.ExitStack() as stack:
            if publish_lock.is_home(root):
                durable.make_directory(root / publish_lock.FOLDER, durable=True)
                stack.enter_context(publish_lock.publishing(root, "command"))
            yield
    finally:
        lock.release()


def root_of(directory: Path) -> Path:
    """Where the job has its lock, and `latest`: above bundles whose names have a slash. Beside these a framework takes such a
    file for one."""
    above = Path(os.path.abspath(directory)).parent
    inner = not os.path.lexists(directory / LOCK) and os.path.lexists(above / LOCK) and bool(committed_in(directory))
    return above if inner else directory


_IN_USE = "'{directory}' is being written to by {holder}: end that first; a job that saves there removes what others have left"


def plan(directory: Path) -> list[Action]:
    """What is to be done, in this order; nothing is changed. See alone_in().

    Raises:
        NotACheckpointError: it is a checkpoint itself.
        StorageError, OSError: it cannot be read.
    """
    if is_checkpoint(directory):
        raise NotACheckpointError(f"'{directory}' is one checkpoint: give the directory that holds it")
    return _Plan(directory).make()


class _Plan:
    """
    Attributes:
        after: what will be a checkpoint when all is done: by the name of the directory, its manifest.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names = sorted(names_in(directory))
        self.actions: list[Action] = []
        self.after: dict[str, Manifest] = {}
        self._left: set[Path] = set()

    def make(self) -> list[Action]:
        below = [self._directory / name for name in self._names if (self._directory / name).is_dir()]
        steps = [path for path in below if is_step_name(path.name)]
        self._committed = {manifest.sequence for _, manifest in committed_deeper_in(self._directory)}
        for path in steps:
            self._plan_step(path)
        for path in below:
            if path not in steps and not path.is_symlink():
                self._plan_bundle(path)
        self._plan_replaced()
        self._plan_top()
        self._plan_latest(bool(steps))
        return self.actions

    def _add(self, do: str, path: Path, why: str, apply: Callable[[], None] = lambda: None) -> None:
        self.actions.append(Action(do, path, why, apply))

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _plan_step(self, path: Path) -> None:
        prepared = None if path.is_symlink() else self._prepared(path)  # where it leads, another job may be publishing
        if prepared is not None:
            self._add(FINALISE, path, f"step {prepared.manifest.step} is complete", lambda: _finalise(path, prepared))
        manifest = prepared.manifest if prepared is not None else manifests.read_if_any(path)
        if manifest is not None:
            self.after[path.name] = manifest
            if not path.is_symlink() and path not in self._left:
                self._plan_beside(path, manifest, prepared)
        elif path in self._left:
            return
        elif os.path.lexists(path / manifests.NAME):
            self._add(LEAVE, path, "its manifest cannot be understood")
        elif unpublished.is_leftover(names_in(path)):
            if not path.is_symlink():
                self._add(REMOVE, path, "a save that died before it was complete", lambda: _remove_directory(path))
        else:
            self._add(LEAVE, path, f"holds files, but no {manifests.NAME}")

    def _plan_beside(self, path: Path, manifest: Manifest, prepared: Prepared | None) -> None:
        if sharded_files.needs_mending(path, manifest):
            self._add(
                NAME, path / sharded_files.METADATA, "is not yet that of the step", lambda: sharded_files.mend(path, manifest)
            )
        for file in unnamed_in(path, manifest):
            if prepared is None or file != prepared.aside:
                self._add(REMOVE, file, "of a save that died, or was replaced", functools.partial(durable.remove_file, file))

    def _prepared(self, path: Path) -> Prepared | None:
        found = find_prepared(path)
        if found is None:
            return None
        if found.manifest.sequence in self._committed:
            self._leave(path, "it was about to be committed, but another one has its number: a job has gone on without it")
            return None
        for file in found.manifest.files:
            state, problem = judge(path, file, found.manifest, fast=False)
            if state != GOOD:
                self._leave(path, f"it was about to be committed, but '{file.name}' {problem}")
                return None
        self._committed.add(found.manifest.sequence)
        return found

    def _leave(self, path: Path, why: str) -> None:
        """With all that is in it."""
        self._left.add(path)
        self._add(LEAVE, path, why)

    # ---- bundles -----------------------------------------------------------------------------------------------------

    def _plan_bundle(self, path: Path) -> None:
        final = late_names.name_behind(path.name)
        if (path.name.startswith(".") and final is None) or _is_of_another_job(path):
            return
        if not self._plan_complete(path, path.name if final is None else final):
            if final is not None:
                if not any(temporary_names.may_be_in_use(each) for each in names_in(path)):
                    self._add(REMOVE, path, f"'{final}' was not complete", lambda: _remove_directory(path))
                return
            for below in sorted(path.iterdir()):  # names of bundles may have a slash
                if below.is_dir() and not below.is_symlink() and not below.name.startswith("."):
                    self._plan_complete(below, f"{path.name}/{below.name}")

    def _plan_complete(self, path: Path, name: str) -> bool:
        """What is complete, or damaged, or no checkpoint, but holds files of one that died. False: it is no checkpoint."""
        prepared = self._prepared(path)
        manifest = prepared.manifest if prepared is not None else manifests.read_if_any(path)
        if path in self._left:
            self.after |= {} if manifest is None else {name: manifest}
            return True
        if manifest is None and os.path.lexists(path / manifests.NAME):
            self._add(LEAVE, path, "its manifest cannot be understood")
            return True
        if prepared is not None:
            self._add(FINALISE, path, f"'{name}' is complete", lambda: _finalise(path, prepared))
        if late_names.name_behind(path.name) is None or manifest is not None:
            self._plan_temporaries(path, manifest, prepared)
        if manifest is None:
            return False
        self.after[name] = manifest
        waiting = sum(bool(file.temporary) and os.path.lexists(path / file.temporary) for file in manifest.files)
        if waiting:
            self._add(NAME, path, f"{waiting} of its files wait for their names", lambda: complete(path, manifest))
        if late_names.name_behind(path.name) is not None:
            there = manifests.read_if_any(self._directory / name)
            if there is not None and there.sequence > manifest.sequence:
                self.after[name] = there
                self._add(REMOVE, path, f"'{name}' has taken its place", lambda: _complete_if_there(path, manifest))
            else:
                self._add(NAME, path, f"it is to be '{name}'", lambda: _complete_if_there(path, manifest))
        return True

    def _plan_temporaries(self, path: Path, manifest: Manifest | None, prepared: Prepared | None) -> None:
        kept = {file.temporary for file in manifest.files} if manifest is not None else set()
        kept |= set() if prepared is None else {prepared.aside.name}
        for file, _ in temporaries_in(path):
            if file.name not in kept and not temporary_names.may_be_in_use(file.name) and file.is_file():
                self._add(REMOVE, file, "of a save that died", functools.partial(durable.remove_file, file))

    def _plan_replaced(self) -> None:
        for name in self._names:
            behind = late_names.replaced_by(name)
            if behind is None:
                continue
            path = self._directory / name
            if os.path.lexists(self._directory / behind) or behind in self.after:
                self._add(REMOVE, path, f"'{behind}' has taken its place", functools.partial(_remove_directory, path))
            else:
                target = self._directory / behind
                self._add(
                    NAME,
                    path,
                    f"'{behind}' is gone: it gets its name back",
                    functools.partial(durable.rename_durably, path, target),
                )
                if (manifest := manifests.read_if_any(path)) is not None:
                    self.after[behind] = manifest

    # ---- beside them ---------------------------------------------------------------------------------------------------

    def _plan_top(self) -> None:
        for path, behind in temporaries_in(self._directory):
            if is_step_name(behind) and (path.is_dir() or path.is_symlink()):
                self._add(REMOVE, path, "its removal was interrupted", functools.partial(durable.remove_tree, path))
            elif behind == LATEST:
                self._add(REMOVE, path, "of a save that died", functools.partial(durable.remove_file, path))

    def _plan_latest(self, of_steps: bool) -> None:
        """Of steps it names the newest. Of bundles a framework may have wanted another one, so it has only to name one."""
        path, now = self._directory / LATEST, read_latest(self._directory)
        newest = max(self.after.items(), key=lambda item: item[1].sequence, default=None)
        if newest is None:
            if os.path.lexists(path):
                self._add(LEAVE, path, "names a checkpoint, and there is none")
            return
        name = newest[0]
        if now is not None and now not in self.after:
            self._add(
                MEND,
                path,
                f"names '{now}', which is no checkpoint; '{name}' is the newest",
                lambda: _point(path, name, of_steps),
            )
        elif of_steps and now != name:
            before = "nothing" if now is None else f"'{now}'"
            self._add(MEND, path, f"names {before}, and '{name}' is newer", lambda: _point(path, name, of_steps))


def _is_of_another_job(path: Path) -> bool:
    """Whether somebody has a lock of his own there, and saves now, or has saved steps: those are repaired by themselves."""
    if not os.path.lexists(path / LOCK):
        return False
    return DirectoryLock(path).holder() is not None or any(map(is_step_name, names_in(path)))


def _finalise(directory: Path, prepared: Prepared) -> None:
    """As publish() goes on behind the point where the crash came, which may have been before the mark was durable."""
    durable.sync_tree(prepared.aside)
    durable.rename_durably(prepared.aside, directory / manifests.NAME)
    durable.crash_point("manifest-renamed")
    durable.sync_directory(directory.parent)


def _complete_if_there(path: Path, manifest: Manifest) -> None:
    if path.is_dir():  # an action before this may have given it its name, with those of its files
        complete(path, manifest)


def _remove_directory(path: Path) -> None:
    """At once no checkpoint any more, whatever becomes of the rest. An action before this may have removed it."""
    if not os.path.lexists(path):
        return
    retired = durable.retire_directory(path)
    durable.sync_directory(path.parent)
    durable.crash_point("removal-begun")
    durable.remove_tree(retired)


def _point(latest: Path, name: str, of_steps: bool) -> None:
    if manifests.read_if_any(latest.parent / name) is None:  # an action before this has failed
        raise CheckpointError(f"'{name}' is no checkpoint yet")
    durable.replace_durably(latest, f"{name}\n".encode() if of_steps else name.encode(), "latest")
