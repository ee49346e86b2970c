"""Removes the oldest checkpoints of a directory, as a job does that has `keep`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ckpt.directory import late_names
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import read_latest
from ckpt.directory.holds import held_at
from ckpt.directory.keeping import Keeping
from ckpt.directory.manifest import Manifest
from ckpt.directory.step_names import is_step_name
from ckpt.errors import NotACheckpointError
from ckpt.storage import durable
from ckpt.upkeep.rows import committed_below

REMOVED, KEPT, HELD, FAILED = "remove", "keep", "held", "failed"


@dataclasses.dataclass(frozen=True)
class Choice:
    """
    Attributes:
        fate: "remove"; "keep"; "held": it would go, but is on its way to an object store, or `latest` names it.
        why: in words.
    """

    path: Path
    step: int
    sequence: int
    bytes: int
    fate: str
    why: str


def choose(directory: Path, keeping: Keeping) -> list[Choice]:
    """What would become of each checkpoint, newest first. Damaged ones and what is no checkpoint are nobody's to remove here.

    Args:
        keeping: which stay.

    Raises:
        NotACheckpointError: there is none.
        StorageError: it cannot be read.
    """
    found = [(path, manifest) for path, manifest in committed_below(directory) if not path.is_symlink()]
    if not found:
        raise NotACheckpointError(f"'{directory}' holds no checkpoint")
    latest = read_latest(directory)
    held = held_at(directory, [manifest for _, manifest in found[keeping.newest :]])
    reasons = keeping.reasons([manifest for _, manifest in found])
    return [_choose(path, manifest, latest, held, reason) for (path, manifest), reason in zip(found, reasons, strict=True)]


def _choose(path: Path, manifest: Manifest, latest: str | None, held: set[int], reason: str) -> Choice:
    name = late_names.name_behind(path.name) or path.name
    if reason:
        fate, why = KEPT, reason
    elif manifest.sequence in held:
        fate, why = HELD, "it is on its way to an object store"
    elif name == latest:
        fate, why = HELD, "latest names it"
    elif manifest.others:
        fate, why = HELD, "files of others lie in it"
    else:
        fate, why = REMOVED, ""
    return Choice(path, manifest.step, manifest.sequence, manifests.bytes_of(manifest), fate, why)


def remove(choice: Choice) -> None:
    """At once no checkpoint any more, whatever becomes of the rest: what is left is removed by the next job, or by repair.

    Raises:
        StorageError: something is left.
    """
    if is_step_name(choice.path.name):
        gone = durable.retire_directory(choice.path)
        durable.sync_directory(choice.path.parent)
    else:  # whoever cleans up knows no retired bundles
        gone = choice.path
        durable.remove_file(gone / manifests.NAME)
        durable.sync_directory(gone)
    durable.crash_point("removal-begun")
    durable.remove_tree(gone)
    if os.path.lexists(choice.path.parent):
        durable.sync_directory(choice.path.parent)
