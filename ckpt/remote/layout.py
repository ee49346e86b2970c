"""What lies below the URL of a run in an object store.

    run.json                                      whose it is: see ownership.py
    latest                                        the newest folder, a hint: what is true is what manifests say
    step-000000001200/000000000417-8f3a61c2/      a folder: one attempt to carry one commit there, never used again
        rank-00000.pt  ...                            as at home
        manifest.json                                 that of home, to the byte; put last: without it there is no checkpoint

Readers look for manifests, and never draw conclusions from other objects. Who removes a checkpoint removes its manifest first.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import Manifest
from ckpt.directory.step_names import is_step_name, step_name
from ckpt.errors import CorruptError
from ckpt.storage.object_store import ObjectStore
from ckpt.storage.stores import StoredObject

logger = logging.getLogger("ckpt")

LATEST = "latest"
_FOLDER = re.compile(r"(?P<step>step-\d+)/(?P<sequence>\d{12})-(?P<token>[0-9a-f]+)")


def new_folder(step: int, sequence: int) -> str:
    """For an attempt to carry this commit there."""
    return f"{step_name(step)}/{sequence:012d}-{secrets.token_hex(4)}"


def folder_of(key: str) -> str | None:
    """The folder in which an object lies; None: it lies in none of ours."""
    folder, _, name = key.rpartition("/")
    match = _FOLDER.fullmatch(folder)
    return folder if name and match is not None and is_step_name(match["step"]) else None


def sequence_in(folder: str) -> int:
    """Of the commit that was carried there."""
    match = _FOLDER.fullmatch(folder)
    return -1 if match is None else int(match["sequence"])


class RemoteCopy(NamedTuple):
    """A checkpoint in the store."""

    folder: str
    manifest: Manifest

    @property
    def sequence(self) -> int:
        return self.manifest.sequence


class Listing(NamedTuple):
    """
    Attributes:
        copies: newest commit first.
        damaged: what is wrong with manifests that cannot be understood.
        objects: by folder, what lies in it, whether it has a manifest or not.
    """

    copies: list[RemoteCopy]
    damaged: list[str]
    objects: dict[str, list[StoredObject]]


class Catalogue:
    """Finds the checkpoints below a URL. A folder is never used again, so no manifest is read twice."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._known: dict[str, RemoteCopy] = {}

    def find(self) -> Listing:
        """
        Raises:
            ObjectStoreError: the store cannot be read.
        """
        objects: dict[str, list[StoredObject]] = {}
        for each in self._store.list(""):
            if (folder := folder_of(each.key)) is not None:
                objects.setdefault(folder, []).append(each)
        copies, damaged = [], []
        for folder, there in objects.items():
            if f"{folder}/{manifests.NAME}" not in {each.key for each in there}:
                continue
            try:
                copy = self._read(folder)
                if copy is not None:
                    copies.append(copy)
            except CorruptError as error:
                damaged.append(str(error))
        return Listing(sorted(copies, key=lambda copy: copy.sequence, reverse=True), damaged, objects)

    def _read(self, folder: str) -> RemoteCopy | None:
        if folder not in self._known:
            manifest = read_manifest(self._store, folder)
            if manifest is None:
                return None  # just removed
            self._known[folder] = RemoteCopy(folder, manifest)
        return self._known[folder]


def read_manifest(store: ObjectStore, folder: str) -> Manifest | None:
    """None: there is none.

    Raises:
        CorruptError: it cannot be understood, or is of another commit.
        ObjectStoreError: the store cannot be read.
    """
    key = f"{folder}/{manifests.NAME}"
    found = store.read_small(key)
    if found is None:
        return None
    try:
        manifest = manifests.parse(found.content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptError(f"'{store.url}/{key}' is not a valid manifest: {error}") from error
    if (manifest.sequence, step_name(manifest.step)) != (sequence_in(folder), folder.partition("/")[0]):
        raise CorruptError(f"'{store.url}/{key}' is of another checkpoint than its folder")
    return manifest


def move_latest(store: ObjectStore, folder: str) -> None:
    """Forward only. It is a hint: if others are quicker again and again, it stays as it is.

    Raises:
        ObjectStoreError: the store does not answer.
    """
    content = f"{folder}\n".encode()
    for _ in range(3):
        before = store.read_small(LATEST)
        if before is None:
            if store.create(LATEST, content):
                return
            continue
        if sequence_in(before.content.decode(errors="replace").strip()) >= sequence_in(folder):
            return
        if store.exchange(LATEST, content, before):
            return


def remove_folder(store: ObjectStore, folder: str, objects: Sequence[StoredObject]) -> None:
    """Its manifest first: from then on it is no checkpoint, whatever becomes of the rest.

    Raises:
        ObjectStoreError: not all could be removed.
    """
    store.remove(f"{folder}/{manifests.NAME}")
    if objects:
        store.remove_all([each.key for each in objects])
