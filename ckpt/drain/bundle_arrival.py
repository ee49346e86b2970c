"""The commit of an inbox that holds a bundle: its files come into the directory that a framework has named.

Their names are fixed, so they may replace files that are in use. It is done as a job does it that saves there itself, see
directory/bundles.py:

    1. plan.json: the temporary name of each file      an inbox
    2. each file gets that name in the directory       the same
    3. fsync of the directory                          the same
    4. the manifest, which lists both names            a checkpoint
    5. each file gets its own name                     the same
    6. `latest`, unless it names something newer       the newest checkpoint by name, too

An end between any two leaves what the next attempt takes up; behind 4, whoever looks at the directory does.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

from ckpt.directory import bundles
from ckpt.directory import manifest as manifests
from ckpt.directory.listing import LATEST
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.root import Root
from ckpt.drain.arrival import PLAN, is_placed
from ckpt.drain.choice import created_s
from ckpt.errors import StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path


class BundleArrival:
    """One commit. Its caller has the lock of home.

    Args:
        manifest: as on the nodes.
    """

    def __init__(self, home: Path, inbox: Path, manifest: Manifest) -> None:
        self._home = home
        self._inbox = inbox
        self._manifest = manifest
        self._directory = home / manifest.bundle
        self._root = Root(home)

    def publish(self) -> None:
        """
        Raises:
            MissingError: a file is neither in the inbox nor in the directory.
            StorageError: a system call failed.
        """
        if manifests.is_at(self._directory, self._manifest.sequence):
            self.finish()
            return
        temporaries = self._read_plan() or self._make_plan()
        durable.make_directory(self._directory, durable=True)
        for entry in self._manifest.files:
            self._place(entry, self._directory / temporaries[entry.name])
            durable.crash_point("drain-placed")
        durable.sync_directory(self._directory)
        durable.crash_point("drain-all-placed")
        there = self._at_home(temporaries)
        durable.replace_durably(self._directory / manifests.NAME, there.to_json(), "manifest")
        bundles.give_final_names(self._directory, there.files)
        durable.crash_point("placed")
        self._point_latest()

    def finish(self) -> None:
        """What follows the rename of the manifest, if there was an end behind it."""
        there = manifests.read(self._directory)
        bundles.complete(self._directory, there)
        durable.sync_directory(self._directory)
        self._point_latest()

    def tidy(self) -> None:
        """What killed drains have left. Old checkpoints are not ours to remove: whoever names them does."""
        for left in (self._home / LATEST, self._directory / manifests.NAME):
            durable.remove_stale(left)

    # ---- files -----------------------------------------------------------------------------------------------------

    def _read_plan(self) -> dict[str, str] | None:
        path = self._inbox / PLAN
        try:
            return {str(name): str(temporary) for name, temporary in json.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            raise StorageError(errno.EIO, f"cannot read '{path}': {error}", str(self._inbox)) from error

    def _make_plan(self) -> dict[str, str]:
        plan = {entry.name: temporary_path(self._directory / _called(entry)).name for entry in self._manifest.files}
        durable.replace_durably(self._inbox / PLAN, json.dumps(plan).encode(), "drain-plan")
        return plan

    def _place(self, entry: FileEntry, target: Path) -> None:
        source = self._inbox / entry.name
        if is_placed(source, target, entry):
            return
        try:
            durable.link_or_rename(source, target)
        except StorageError as error:
            if error.errno != errno.EEXIST:
                raise
            durable.remove_file(target)  # what an attempt has left whose inbox is gone
            durable.link_or_rename(source, target)

    def _at_home(self, temporaries: dict[str, str]) -> Manifest:
        alone = [dataclasses.replace(entry, shared_bytes=0, shared_step=0) for entry in self._manifest.files]
        files = tuple(
            dataclasses.replace(entry, name=_called(entry), temporary=temporaries[entry.name], called="") for entry in alone
        )
        return dataclasses.replace(self._manifest, files=files, bundle="")

    # ---- latest ----------------------------------------------------------------------------------------------------

    def _point_latest(self) -> None:
        if self._manifest.moves_latest and not latest_is_right(self._home, self._manifest.bundle, self._manifest):
            self._root.point_latest(self._manifest.bundle)


def has_settled(home: Path, name: str, sequence: int, *, moves_latest: bool) -> bool:
    """Whether a bundle is at home, all its files have their own names, and `latest` has moved, if it is to."""
    there = manifests.read_if_any(home / name)
    if there is None or there.sequence != sequence or bundles.is_unsettled(home / name):
        return False
    return not moves_latest or latest_is_right(home, name, there)


def latest_is_right(home: Path, name: str, manifest: Manifest) -> bool:
    """Whether `latest` names this bundle, or what was committed behind it."""
    named = bundles.read_latest(home)
    if named is None:
        return False
    there = manifests.read_if_any(home / named)
    if there is not None:
        return there.sequence > manifest.sequence or named == name
    try:  # somebody else's, who has written no manifest
        return os.path.isdir(home / named) and os.stat(home / LATEST).st_mtime > created_s(manifest)
    except OSError:
        return False


def _called(entry: FileEntry) -> str:
    return entry.called or entry.name
