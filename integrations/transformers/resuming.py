"""Which checkpoint a Trainer resumes from: the newest that is complete and good."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import ckpt
from ckpt.errors import CorruptError

from ..huggingface.saved_again import is_saved_again
from .transformers_private import INCOMPLETE

logger = logging.getLogger("ckpt")

_NAME = re.compile(r"checkpoint-(\d+)")
_LAST_WRITTEN = "trainer_state.json"  # the last file that the Trainer itself writes


def newest_good(checkpointer: ckpt.BundleCheckpointer, root: str) -> str | None:
    """The path of the checkpoint with the highest number among those that are good on all ranks. To be called by all of them.

    What was saved without this library is taken if it looks complete.

    Returns:
        None if there is none at all.

    Raises:
        CorruptError: none is good; the message says why.
    """
    refused: dict[str, str] = {}
    while True:
        names = [name for name in _names_in(root) if name not in refused]
        if not names:
            checkpointer.find(root)  # a crash may have left one complete, but without its name
            names = [name for name in _names_in(root) if name not in refused]
        if not names:
            break
        try:
            found = _find(checkpointer, Path(root), names[0])
        except CorruptError as error:
            logger.warning("'%s' is left out: %s", os.path.join(root, names[0]), error)
            refused[names[0]] = str(error)
            continue
        if found is not None and names[0] == next(iter(name for name in _names_in(root) if name not in refused), None):
            return os.path.join(root, found)
    if refused:
        raise CorruptError(f"no checkpoint in '{root}' can be resumed from: {'; '.join(refused.values())}")
    return None


def verify(checkpointer: ckpt.BundleCheckpointer, path: str) -> None:
    """To be called by all ranks.

    Raises:
        CorruptError: what lies there is incomplete or damaged.
    """
    checkpoint = Path(os.path.abspath(path))
    _find(checkpointer, checkpoint.parent, checkpoint.name)


def _find(checkpointer: ckpt.BundleCheckpointer, root: Path, name: str) -> str | None:
    """As find() of the checkpointer; but what a stock Trainer has saved again is taken as if it had saved it first."""
    from accelerate.utils import broadcast_object_list

    try:
        return checkpointer.find(root, name)
    except CorruptError:
        said: list[Any] = [is_saved_again(root / name)]
        broadcast_object_list(said)
        if not said[0]:
            raise
    logger.warning("'%s' is not verified: it was saved again without this library", root / name)
    return name


def _names_in(root: str) -> list[str]:
    """Of checkpoints that look complete, the highest number first; as rank 0 sees them, on all ranks."""
    from accelerate.utils import broadcast_object_list

    there: list[Any] = [sorted(filter(_is_complete, _checkpoints_in(root)), key=_number, reverse=True)]
    broadcast_object_list(there)
    return [path.name for path in there[0]]


def _checkpoints_in(root: str) -> list[Path]:
    try:
        return [path for path in Path(root).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []


def _is_complete(path: Path) -> bool:
    return (path / _LAST_WRITTEN).exists() and not (path / INCOMPLETE).exists()


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
