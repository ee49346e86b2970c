"""The steps by which the files of a step become a checkpoint, whoever has written them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory import sharded_files, unpublished
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.root import Root, has_size
from ckpt.errors import CorruptError
from ckpt.storage import durable


def publish(
    root: Root,
    directory: Path,
    manifest: Manifest,
    token: str,
    note_replaced: Callable[[Path, Iterable[str]], None],
    *,
    newest: bool = True,
    local: Callable[[FileEntry], bool] = lambda _: True,
    unsynced: bool = False,
) -> None:
    """Makes the step a checkpoint; a crash between any two lines leaves the state named on the right.

        1. write the manifest aside, and what `latest` is going to be; then fsync both, the parent of the step directory, and
           that itself                             not a checkpoint: no manifest; the mark is what was written aside
        2. rename to manifest.json                 a checkpoint, if the rename survives
        3. fsync the step directory                a checkpoint
        4. `latest`: rename, fsync                 the newest checkpoint by name, too

    What is written in 1 may become durable in any order: of all of it none is looked at as long as there is no manifest.

    Args:
        root: of the step; its caller sees to it that nobody else publishes there.
        directory: of the step.
        token: names its mark: see unpublished.py.
        note_replaced: called with the directory and what its manifest has named until now.
        newest: whether no later commit is there; else `latest` stays as it is.
        local: which files are to be here; others lie on other nodes.
        unsynced: the names of files in the step directory are not durable yet.

    Raises:
        StorageError: a system call failed; what was committed before still stands, and the step too, if only 3 or 4 failed.
        CorruptError: a file is not there, or has another size.
    """
    if (before := manifests.read_if_any(directory)) is not None:
        note_replaced(directory, sharded_files.names_of(before))
    content = manifest.to_json()
    place = os.fspath(directory)  # making a Path of each of thousands of files takes longer than looking at it
    with unpublished.aside(directory, token) as aside, root.latest_aside() if newest else contextlib.nullcontext() as latest:
        files = {aside: content} | ({} if latest is None else {latest: f"{directory.name}\n".encode()})
        durable.make_durable(files, [root.reach, *([directory] if unsynced else [])])
        durable.crash_point("manifest-written")
        for file in filter(local, manifest.files):  # whatever may have gone wrong before: no manifest names what is not there
            if not has_size(f"{place}/{file.name}", file.bytes):
                raise CorruptError(f"'{directory / file.name}' does not have the {file.bytes} bytes that its rank has written")
        durable.rename_durably(aside, directory / manifests.NAME)
        durable.crash_point("manifest-renamed")
        manifests.note_written(content, manifest)  # it is read again at once, to see what is kept
        if latest is not None:
            root.move_latest(latest)
