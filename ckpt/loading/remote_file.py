"""One file of a checkpoint in an object store: fetched, and compared with the manifest beside it, before anybody reads it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckpt.directory.frozen_files import companion_of
from ckpt.errors import NotACheckpointError
from ckpt.remote.download import Expected, download
from ckpt.remote.layout import read_manifest
from ckpt.storage import scratch
from ckpt.storage.object_store import ObjectStore
from ckpt.storage.object_urls import is_url, parse_url

logger = logging.getLogger("ckpt")


@contextlib.contextmanager
def as_local(path: str | os.PathLike[str]) -> Iterator[Path]:
    """What is to be read. A file in an object store lies in the directory of temporary files meanwhile.

    Raises:
        ValueError: it is a URL, but of no file.
        NotACheckpointError: there is no manifest beside it, or that does not name it.
        CorruptError: it is not what its manifest says.
        StorageError: it cannot be fetched.
    """
    if not is_url(path):
        yield Path(os.fspath(path))
        return
    directory = scratch.make_private_directory(None)
    try:
        yield _fetch(str(path), directory)
    finally:
        scratch.remove(directory)


def _fetch(url: str, directory: Path) -> Path:
    try:
        above, name = parse_url(url).split_file()
        run, step, folder = _split(above)
    except ValueError as error:
        text = f"the URL of a file is '<URL of the tier>/step-<step>/<folder>/<file>', and {url!r} is none: it {error}"
        raise ValueError(text) from None
    store = ObjectStore(run)
    folder = f"{step}/{folder}"
    manifest = read_manifest(store, folder)
    if manifest is None:
        raise NotACheckpointError(f"'{above}' holds no manifest.json: it was not carried to its end, or is being removed")
    entry = next((file for file in manifest.files if file.name == name), None)
    if entry is None:
        there = ", ".join(file.name for file in manifest.files[:8])
        raise NotACheckpointError(f"the manifest of '{above}' names no '{name}'; it names {there}")
    frozen = companion_of(manifest, entry)
    for each in (entry, frozen):
        if each is not None:
            with scratch.new_file(directory / each.name) as file:
                expected = Expected(f"{folder}/{each.name}", each.bytes, each.crc32)
                download(store, expected, functools.partial(_write, file))
    logger.info("'%s' was fetched and is what its manifest says", url)
    return directory / name


def _write(file: Any, _: int, chunk: memoryview) -> None:
    file.write(chunk)


def _split(above: str) -> tuple[str, str, str]:
    """URL of the tier, step directory, folder."""
    parts = above.rsplit("/", 2)
    if len(parts) != 3 or not parts[1].startswith("step-") or parts[0].count("/") < 2:
        raise ValueError("does not lie in a folder of a step")
    return parts[0], parts[1], parts[2]
