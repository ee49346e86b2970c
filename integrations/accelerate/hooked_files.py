"""What hooks have written beside a state. It goes with the state when another one takes its place; what others put there stays.

A directory that gets its name last holds nothing else when it gets that. So each rank notes then what lies there, if there is
anything at all, in a hidden directory; and what is as it was noted is not somebody else's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from ..huggingface.open_bundle import OpenBundle
from . import accelerate_private as private

_NOTES = ".lazyckpt-hooks"  # a file of each rank; not directly in the bundle, so that its manifest does not list it


def note(bundle: OpenBundle, rank: int) -> None:
    """Of one that gets its name last, when this rank's hooks have run.

    Raises:
        OSError: it cannot be read.
    """
    with contextlib.suppress(FileNotFoundError):  # somebody has removed it: whoever publishes it finds out
        found = dict(_entries(bundle.directory))
        if found:
            bundle.save(found, bundle.directory / _NOTES / f"{rank}.pt")


def strangers_in(directory: Path) -> list[str]:
    """What lies there beside a state, and is not as hooks have left it; as paths from there.

    Raises:
        OSError: it cannot be read.
    """
    found = list(_entries(directory))
    noted = _noted(directory) if found else set()
    return sorted(name for name, changed in found if (name, changed) not in noted)


def _entries(directory: Path) -> Iterator[tuple[str, int]]:
    """Files, links and directories that save_state() does not make, at any depth; and when each file was changed, in ns."""
    for entry in os.scandir(directory):
        if not private.is_of_a_state(entry.name) and entry.name != _NOTES:
            yield from _at_and_below(directory, Path(entry.path))


def _at_and_below(directory: Path, path: Path) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError):  # hooks of other ranks may still give files their names: these note them
        is_directory = path.is_dir() and not path.is_symlink()
        yield str(path.relative_to(directory)), 0 if is_directory else path.lstat().st_mtime_ns
        if is_directory:
            for inner in path.iterdir():
                yield from _at_and_below(directory, inner)


def _noted(directory: Path) -> set[tuple[str, int]]:
    noted: set[tuple[str, int]] = set()
    for path in (directory / _NOTES).glob("[0-9]*.pt"):
        try:
            noted.update(torch.load(path, weights_only=True).items())
        except (OSError, RuntimeError, ValueError, AttributeError, TypeError, EOFError, pickle.UnpicklingError):
            continue  # then what it names is somebody else's
    return noted
