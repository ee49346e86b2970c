"""What a path on the command line means."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ckpt.directory import late_names
from ckpt.directory.step_names import is_step_name, step_name
from ckpt.errors import NotACheckpointError
from ckpt.upkeep.census import is_checkpoint, look
from ckpt.upkeep.rows import COMMITTED, DAMAGED

logger = logging.getLogger("ckpt")


def resolve(text: str) -> tuple[Path, str]:
    """The checkpoint or file that is meant, and the name of a file in it, as in "run1/step-000000000042:state.pt"; else empty.

    Of a directory that holds checkpoints it is the newest. "run1:42" is step 42 of that, "run1:42:state.pt" a file in it.

    Raises:
        NotACheckpointError: there is nothing.
        StorageError: it cannot be read.
    """
    path, name = Path(text), ""
    if not os.path.lexists(path) and ":" in text:
        before, _, name = text.rpartition(":")
        path = Path(before)
    if not os.path.lexists(path) and ":" in str(path):
        path = _named_in(*str(path).rsplit(":", 1)) or path
    if not os.path.lexists(path):
        raise NotACheckpointError(f"'{path}' does not exist")
    if not path.is_dir():
        if name:
            raise NotACheckpointError(f"'{path}' is a file: nothing can be named in it")
        return path, ""
    if is_checkpoint(path) or is_step_name(path.name):
        return path, name
    if name and (named := _named_in(str(path), name)) is not None:
        return named, ""
    if name:
        if not os.path.lexists(path / name):
            raise NotACheckpointError(f"'{path}' holds no step, checkpoint or file '{name}'")
        return path, name
    if (found := _newest(path)) is None:
        return path, ""
    return found, ""


def _named_in(directory: str, name: str) -> Path | None:
    """A checkpoint in it, by its name or by the number of its step."""
    if name.isdecimal() and name.isascii() and (step := Path(directory, step_name(int(name)))).is_dir():
        return step
    return Path(directory, name) if Path(directory, name).is_dir() else None


def _newest(directory: Path) -> Path | None:
    """None if none is committed there. What may be newer, and is damaged, is not passed over without a word."""
    rows = look(directory)
    row = next((row for row in rows if row.state == COMMITTED), None)
    if row is None:
        return None
    for other in rows:
        if other.state == DAMAGED and (other.sequence is None or other.sequence > (row.sequence or 0)):
            logger.warning("'%s' is passed over, '%s' is taken: %s", directory / other.name, row.name, other.problem)
    path = directory / row.name
    return path if path.is_dir() else late_names.partial_of(directory, row.name)
