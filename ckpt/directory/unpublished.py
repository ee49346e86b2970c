"""Step directories without a manifest: what a save that died has left, or somebody's files whose manifest is lost.

A file of a step gets its name before a manifest names it. So that a crash in between can be told from that, its directory
bears a mark meanwhile: the file that is going to be the manifest, empty, under its temporary name. Publication fills it and
renames it. So the mark goes in the very moment in which the directory becomes a checkpoint.

    only temporary names                    a save that died: nothing in it was finished
    finished files and the mark             the same, later
    finished files, and no mark             a checkpoint that has lost its manifest, or is just being copied here: not ours to
                                            remove, and no reason to begin anew

A directory that holds finished files when a save to it begins gets no mark: it would speak of those files, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.step_names import STEP_FILE, names_in
from ckpt.errors import StorageError
from ckpt.storage import durable, temporary_names

UNMARKED = "unmarked"
_MOST_NAMED = 4


def mark_of(directory: Path, token: str) -> Path:
    """The same on all ranks of a job that have the token of its rank 0."""
    return temporary_names.temporary_by(directory / manifests.NAME, token)


@contextlib.contextmanager
def aside(directory: Path, token: str) -> Iterator[Path]:
    """Where to write the manifest aside: into the mark, or, where there is none, under a name that is none."""
    mark = mark_of(directory, token)
    if os.path.lexists(mark):
        yield mark
        return
    other = temporary_names.temporary_path(directory / UNMARKED)
    try:
        yield other
    except BaseException:
        durable.remove_quietly(other)
        raise


def is_marked(names: Iterable[str]) -> bool:
    return any(temporary_names.name_behind(name) == manifests.NAME for name in names)


def finished(names: Iterable[str]) -> set[str]:
    """Those that are not temporary ones of ours."""
    return {name for name in names if temporary_names.name_behind(name) is None}


def may_hold_others(names: Iterable[str]) -> bool:
    """Whether a directory of these files holds some that are no unfinished save's: then it must not be marked."""
    names = list(names)
    return bool(finished(names)) and not is_marked(names)


def is_leftover(names: Iterable[str]) -> bool:
    """Whether a directory without a manifest, of these files, may go: all is of saves that are known to be dead."""
    names = list(names)
    left = finished(names)
    return not left or (is_marked(names) and all(STEP_FILE.fullmatch(name) for name in left))


def is_lost(directory: Path) -> bool:
    """Whether a step directory holds files that nobody is known to have given up, and no manifest."""
    try:
        names = names_in(directory)
    except StorageError:
        return True  # who cannot look cannot say that it is nothing
    if manifests.NAME in names or is_leftover(names):
        return False
    # Once more: a living job may have published or removed it while its names were read.
    return os.path.isdir(directory) and not os.path.lexists(directory / manifests.NAME)


def describe(root: Path, lost: list[Path]) -> str:
    """What to say if there is nothing else."""
    named = ", ".join(path.name for path in sorted(lost)[:_MOST_NAMED]) + (", ..." if len(lost) > _MOST_NAMED else "")
    count = "1 step directory" if len(lost) == 1 else f"{len(lost)} step directories"
    return (
        f"'{root}' holds {count} without {manifests.NAME} ({named}) and no checkpoint: nothing was resumed, and nothing of "
        "this will be deleted. Bring the manifests back, as from a backup, and resume then; or move these directories away; or "
        "begin anew beside them: resume(fresh=True), or restore(fresh=True) of a Checkpointer"
    )
