"""Removes the oldest checkpoints of a directory, as a job does that has `keep`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection
from pathlib import Path

from ckpt.directory import late_names
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import committed_deeper_in, read_latest, remove_bundle
from ckpt.directory.going_back import sequences_at
from ckpt.directory.holds import held_at
from ckpt.directory.keeping import Keeping
from ckpt.directory.manifest import Manifest
from ckpt.directory.root import missing_files
from ckpt.directory.step_names import is_step_name
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError
from ckpt.storage import durable
from ckpt.upkeep.repairing import root_of
from ckpt.upkeep.room import Room
from ckpt.upkeep.verifying import BAD, MISSING, Told, verify

REMOVED, KEPT, HELD, FAILED = "remove", "keep", "held", "failed"
_STEP = re.compile(r"(?:^|/|step|checkpoint|iter)[-_=]?(\d+)(?:\.ckpt)?$", re.IGNORECASE)  # in the name of a bundle
_NONE = -1  # for Keeping: no step, and no multiple but of 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """
    Attributes:
        fate: "remove"; "keep"; "held": it would go, but is on its way to an object store, or `latest` names it; or it is
            damaged, and so is none of those that are kept.
        why: in words.
        is_best: whether it is one of the best, for which others go.
        frees: bytes of the disk that removing it alone would give back.
    """

    path: Path
    step: int
    sequence: int
    bytes: int
    fate: str
    why: str
    is_best: bool = False
    frees: int = 0


def with_frees(choices: list[Choice]) -> tuple[list[Choice], int]:
    """The same, and what removing all of those that go would give back: more than the sum of what each does, if they share."""
    room = Room({str(choice.path): choice.path for choice in choices})
    freed, going = room.freed_by_each(), [choice for choice in choices if choice.fate == REMOVED]
    total = min(sum(choice.bytes for choice in going), room.freed_by([str(choice.path) for choice in going]))
    each = [dataclasses.replace(choice, frees=min(choice.bytes, freed.get(str(choice.path), 0))) for choice in choices]
    return each, total


def decide(directory: Path, keeping: Keeping, told: Told = lambda _: None) -> list[Choice]:
    """As choose(). Before anything may go, the newest that stays is read, and the best: what goes may be all that could stand
    in for them. A best one that is damaged is none.

    Raises:
        CorruptError: the bytes of the newest are not those that were written.
        NotACheckpointError, CheckpointError, StorageError: as of choose().
    """
    changed: set[Path] = set()
    read: set[Path] = set()
    while True:
        choices = choose(directory, keeping, changed)
        if all(choice.fate != REMOVED for choice in choices):
            return choices
        newest = next(choice.path for choice in choices if choice.fate == KEPT)
        unread = [each for each in [newest, *(each.path for each in choices if each.is_best)] if each not in read]
        if not unread:
            return choices
        for path in dict.fromkeys(unread):
            read.add(path)
            problems = [
                f"{path / each.file}: {each.problem}" for each in verify(path, False, told) if each.state in (BAD, MISSING)
            ]
            if problems and path == newest:
                raise CorruptError(
                    f"the newest that would stay is damaged, so nothing was removed ({'; '.join(problems)}): bring a copy of "
                    "it, or move it away"
                )
            if problems:
                changed.add(path)


def choose(directory: Path, keeping: Keeping, changed: Collection[Path] = ()) -> list[Choice]:
    """What would become of each checkpoint, newest first.

    Damaged ones, as far as names and sizes of files tell, and what is no checkpoint are nobody's to remove here. They are none
    of the newest either, nor of the best: what they would stand in for may be all that is left.

    Args:
        keeping: which stay.
        changed: those whose bytes are not what was written.

    Raises:
        NotACheckpointError: there is none.
        CheckpointError: none has the metric by which the best are chosen.
        StorageError: it cannot be read.
    """
    root = root_of(directory)
    found = [(path, manifest) for path, manifest in committed_deeper_in(directory) if not _is_behind_link(path, directory)]
    if not found:
        raise NotACheckpointError(f"'{directory}' holds no checkpoint")
    names = {path: late_names.name_behind(path.name) or os.path.relpath(path, root) for path, _ in found}
    steps = {path: _step_of(names[path], manifest) for path, manifest in found}
    lost = {path: path not in changed and bool(missing_files(path, manifest)) for path, manifest in found}
    whole = [(path, manifest) for path, manifest in found if not lost[path] and path not in changed]
    counted = [dataclasses.replace(manifest, step=_NONE if (at := steps[path]) is None else at) for path, manifest in whole]
    _refuse_unknown_metric(counted, keeping)
    reasons = keeping.with_pinned(*sequences_at(root, living=True)).reasons(counted)
    best = keeping.best_of(counted)
    going = [manifest for manifest, reason in zip(counted, reasons, strict=True) if not reason]
    held, latest = held_at(root, going), read_latest(root)
    fates = {path: _fate(each, held, reason, keeping) for (path, _), each, reason in zip(whole, counted, reasons, strict=True)}
    choices = []
    for path, manifest in found:
        fate, why = fates.get(path, (HELD, "it is damaged: files are missing, or cut off" if lost[path] else "it is damaged"))
        if fate == REMOVED and names[path] == latest:
            fate, why = HELD, "latest names it"
        step, size = steps[path], manifests.bytes_of(manifest)
        is_best = path in fates and manifest.sequence in best
        choices.append(Choice(path, manifest.step if step is None else step, manifest.sequence, size, fate, why, is_best))
    return choices


def _step_of(name: str, manifest: Manifest) -> int | None:
    """Of a bundle, if its framework has told no step, what its name says; None if that says none."""
    if manifest.step or is_step_name(name):
        return manifest.step
    match = _STEP.search(name)
    return None if match is None else int(match[1])


def _refuse_unknown_metric(whole: list[Manifest], keeping: Keeping) -> None:
    known = sorted({name for manifest in whole for name, _ in manifest.metrics})
    if keeping.by and keeping.by not in known:
        there = f"there are {', '.join(map(repr, known))}" if known else "none was saved with metrics"
        raise CheckpointError(f"no whole checkpoint has the metric '{keeping.by}', so none would be the best: {there}")


def _is_behind_link(path: Path, directory: Path) -> bool:
    return path.is_symlink() or (path.parent != directory and path.parent.is_symlink())


def _fate(manifest: Manifest, held: set[int], reason: str, keeping: Keeping) -> tuple[str, str]:
    """Of one that is whole, and the reason.

    Args:
        reason: for which it is to stay; empty if there is none.
    """
    if reason:
        return KEPT, reason
    if manifest.sequence in held:
        return HELD, "it is on its way to an object store"
    if manifest.others:
        return HELD, "files of others lie in it"
    if keeping.every is not None and manifest.step == _NONE:
        return HELD, f"neither its manifest nor its name says its step, which may be a multiple of {keeping.every}"
    return REMOVED, ""


def remove(choice: Choice) -> None:
    """A step is at once no checkpoint any more: what is left is removed by the next job, or by repair.

    Raises:
        StorageError: something is left.
    """
    if is_step_name(choice.path.name):
        gone = durable.retire_directory(choice.path)
        durable.sync_directory(choice.path.parent)
        durable.crash_point("removal-begun")
        durable.remove_tree(gone)
    else:  # whoever cleans up knows no retired bundles
        remove_bundle(choice.path)
    if os.path.lexists(choice.path.parent):
        durable.sync_directory(choice.path.parent)
