"""A commit record that is written, but has not got its name: a crash came between the two.

Whoever publishes writes the manifest aside, makes it durable and renames it (see directory/publishing.py). By then all files
are durable. So a directory in which a whole manifest lies under its temporary name, with all files that it names, is a
checkpoint that nobody was told of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory import unpublished
from ckpt.directory.manifest import Manifest
from ckpt.directory.root import missing_files
from ckpt.directory.step_names import names_in
from ckpt.storage import temporary_names

_ASIDE = (manifests.NAME, unpublished.UNMARKED)


class Prepared(NamedTuple):
    """`aside`: the manifest, under its temporary name."""

    aside: Path
    manifest: Manifest


def find_prepared(directory: Path) -> Prepared | None:
    """The newest that is complete as far as names and sizes tell; None if there is none, or what stands there is as new.

    Raises:
        StorageError: the directory cannot be read.
    """
    there = manifests.read_if_any(directory)
    found = [each for each in _written_aside(directory) if there is None or each.manifest.sequence > there.sequence]
    complete = [each for each in found if not missing_files(directory, each.manifest)]
    return max(complete, key=lambda each: each.manifest.sequence, default=None)


def _written_aside(directory: Path) -> Iterator[Prepared]:
    for name in sorted(names_in(directory)):
        if temporary_names.name_behind(name) in _ASIDE:
            try:
                yield Prepared(directory / name, manifests.parse((directory / name).read_bytes()))
            except (OSError, KeyError, TypeError, ValueError, RecursionError):
                continue  # empty, as a mark is, or cut off
