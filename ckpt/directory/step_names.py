"""Step directories: their names, and those of the files in them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import Manifest
from ckpt.errors import StorageError
from ckpt.storage import temporary_names

_PREFIX = "step-"
_DIGITS = 12  # so that names sort like numbers
STEP_FILE = re.compile(
    r"(?P<stem>(state|rank-\d{5,})(\.frozen)?|replicated)(-\d+)?\.pt|(?P<sharded>__\d+(_frozen)?)_\d+\.(distcp|crc32)"
    r"|(?P<metadata>\.metadata)(-\d+)?|receipt-\d{5,}(-\d+)?\.json"
)


def step_name(step: int) -> str:
    """The directory name of a step.

    Raises:
        TypeError, ValueError: it is not a count of at most 12 digits.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int, not {type(step).__name__}")
    if not 0 <= step < 10**_DIGITS:
        raise ValueError(f"step must lie between 0 and {10**_DIGITS - 1}, but is {step}")
    return f"{_PREFIX}{step:0{_DIGITS}d}"


def step_of(name: str) -> int:
    """The step of a name of step_name()."""
    return int(name.removeprefix(_PREFIX))


def name_at_home(manifest: Manifest) -> str:
    """Of the directory of what lies on a node."""
    return manifest.bundle or step_name(manifest.step)


def is_step_name(name: str) -> bool:
    digits = name.removeprefix(_PREFIX)
    return name.startswith(_PREFIX) and len(digits) == _DIGITS and digits.isdecimal() and digits.isascii()


def written_for(name: str) -> str | None:
    """The final name of a file of a step or of a temporary on its way to one; None for files that are not ours."""
    if temporary_names.is_temporary(name):
        return temporary_names.name_behind(name)
    return name if STEP_FILE.fullmatch(name) else None


def names_in(directory: Path) -> set[str]:
    """Of what is in it; none if it is not there.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{directory}': {error.strerror}", str(directory)) from error


def stem_of(name: str) -> str | None:
    """ "rank-00003" of "rank-00003-2.pt"; None for files that are not of a step."""
    match = STEP_FILE.fullmatch(name)
    return None if match is None else match["stem"] or match["sharded"] or match["metadata"]


def names_in_manifest(directory: Path) -> set[str]:
    """Also of a file whose save ended without word from rank 0, which may publish it yet."""
    manifest = manifests.read_if_any(directory)
    return set() if manifest is None else manifests.names(manifest.files)


def free_name(stem: str, taken: set[str]) -> str:
    """Of a file: "state.pt" or "state-2.pt", "__3_0.distcp" or "__3_1.distcp", ".metadata" or ".metadata-2"."""
    number = 1
    while (name := numbered_name(stem, number)) in taken:
        number += 1
    return name


def numbered_name(stem: str, number: int) -> str:
    """Of a file; 1 is that of a step which is saved for the first time."""
    if stem.startswith("__"):
        return f"{stem}_{number - 1}.distcp"
    suffix = "" if stem.startswith(".") else ".pt"
    return f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}"
