"""Removes the oldest checkpoints of a directory, as a job does that has `keep`."""

from __future__ import annotations

import dataclasses
import os
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
from ckpt.upkeep.verifying import BAD, MISSING, Told, verify

REMOVED, KEPT, HELD, FAILED = "remove", "keep", "held", "failed"


@dataclasses.dataclass(frozen=True)
class Choice:
    """
    Attributes:
        fate: "remove"; "keep"; "held": it would go, but is on its way to an object store, or `latest` names it; or it is
            damaged, and so is none of those that are kept.
        why: in words.
    """

    path: Path
    step: int
    sequence: int
    bytes: int
    fate: str
    why: str


def choose(directory: Path, keeping: Keeping) -> list[Choice]:
    """What would become of each checkpoint, newest first.

    Damaged ones, as far as names and sizes of files tell, and what is no checkpoint are nobody's to remove here. They are none
    of the newest either, nor of the best: what they would stand in for may be all that is left.

    Args:
        keeping: which stay.

    Raises:
        NotACheckpointError: there is none.
        CheckpointError: none has the metric by which the best are chosen.
        StorageError: it cannot be read.
    """
    found = [(path, manifest) for path, manifest in committed_deeper_in(directory) if not _is_behind_link(path, directory)]
    if not found:
        raise NotACheckpointError(f"'{directory}' holds no checkpoint")
    whole = [(path, manifest) for path, manifest in found if not missing_files(path, manifest)]
    _refuse_unknown_metric([manifest for _, manifest in whole], keeping)
    latest = read_latest(directory)
    held = held_at(directory, [manifest for _, manifest in whole[keeping.newest :]])
    reasons = keeping.with_pinned(*sequences_at(directory, living=True)).reasons([manifest for _, manifest in whole])
    fates = {path: _fate(manifest, held, reason) for (path, manifest), reason in zip(whole, reasons, strict=True)}
    named = {path: late_names.name_behind(path.name) or str(path.relative_to(directory)) for path, _ in found}
    choices = []
    for path, manifest in found:
        fate, why = fates.get(path, (HELD, "it is damaged: files are missing, or cut off"))
        if fate == REMOVED and named[path] == latest:
            fate, why = HELD, "latest names it"
        choices.append(Choice(path, manifest.step, manifest.sequence, manifests.bytes_of(manifest), fate, why))
    return choices


def _refuse_unknown_metric(whole: list[Manifest], keeping: Keeping) -> None:
    known = sorted({name for manifest in whole for name, _ in manifest.metrics})
    if keeping.by and keeping.by not in known:
        there = f"there are {', '.join(map(repr, known))}" if known else "none was saved with metrics"
        raise CheckpointError(f"no whole checkpoint has the metric '{keeping.by}', so none would be the best: {there}")


def _is_behind_link(path: Path, directory: Path) -> bool:
    return path.is_symlink() or (path.parent != directory and path.parent.is_symlink())


def _fate(manifest: Manifest, held: set[int], reason: str) -> tuple[str, str]:
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
    return REMOVED, ""


def refuse_changed(choices: list[Choice], told: Told = lambda _: None) -> None:
    """Reads the newest that stays: what goes may be all that could stand in for it.

    Raises:
        CorruptError: its bytes are not those that were written.
    """
    newest = next((choice for choice in choices if choice.fate == KEPT), None)
    if newest is None or all(choice.fate != REMOVED for choice in choices):
        return
    damaged = [each for each in verify(newest.path, False, told) if each.state in (BAD, MISSING)]
    if damaged:
        listed = "; ".join(f"{newest.path / each.file}: {each.problem}" for each in damaged)
        raise CorruptError(
            f"the newest that would stay is damaged, so nothing was removed ({listed}): bring a copy of it, or move it away"
        )


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
