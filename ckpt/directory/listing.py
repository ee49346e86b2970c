"""Which checkpoints are in a directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import Manifest
from ckpt.directory.step_names import is_step_name, names_in
from ckpt.errors import NotACheckpointError

LATEST = "latest"
_PAUSES_S = (0.0, 0.0, 0.01, 0.05, 0.2)  # before looking again at a directory that a living job changes


def read_manifests(directories: Iterable[Path]) -> Iterator[tuple[Path, Manifest | NotACheckpointError]]:
    """One by one, each just before the next: the manifest of a directory, or what is wrong with it."""
    for path in directories:
        try:
            yield path, manifests.read(path)
        except NotACheckpointError as error:
            yield path, error


def newest_first(checkpoints: Iterable[tuple[Path, Manifest]]) -> list[tuple[Path, Manifest]]:
    """By when they were committed."""
    return sorted(checkpoints, key=lambda item: item[1].sequence, reverse=True)


class Found(NamedTuple):
    """What is in the directory.

    Attributes:
        checkpoints: newest commit first.
        damaged: what is wrong with manifests that cannot be understood.
        bare: step directories without a manifest.
    """

    checkpoints: list[tuple[Path, Manifest]]
    damaged: list[NotACheckpointError]
    bare: list[Path]


def find_steps(directory: Path) -> Found:
    """What is there. A living job may publish and remove steps meanwhile: what it says is true for one moment, all the same."""
    for pause in _PAUSES_S:
        if pause:  # else it would only let other threads go first
            time.sleep(pause)
        found, missed = _look_once(directory)
        if not missed:
            break
    return found


def newest_after(directory: Path, sequence: int) -> Manifest | None:
    """Of the checkpoint that was committed last, if that was after this commit."""
    newest = next((manifest for _, manifest in find_steps(directory).checkpoints), None)
    return newest if newest is not None and newest.sequence > sequence else None


def _look_once(directory: Path) -> tuple[Found, bool]:
    """Also whether something went while it was looked at: then there may be newer ones, which were not there before."""
    checkpoints: list[tuple[Path, Manifest]] = []
    damaged: list[NotACheckpointError] = []
    bare: list[Path] = []
    missed = False
    for path, said in read_manifests(directory / name for name in names_in(directory) if is_step_name(name)):
        if isinstance(said, Manifest):
            checkpoints.append((path, said))
        elif os.path.lexists(path / manifests.NAME):
            damaged.append(said)
        elif path.is_dir():
            bare.append(path)
        else:
            missed |= not os.path.lexists(path)
    # `latest` says that there are some: those seen may have gone, and those that came may not have been seen.
    missed |= not checkpoints and os.path.lexists(directory / LATEST)
    return Found(newest_first(checkpoints), damaged, bare), missed
