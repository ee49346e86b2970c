"""What is said of each checkpoint, or of what might be one, in a directory or an object store."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import Manifest
from ckpt.storage import temporary_names

# A checkpoint; complete, but its commit record has no name yet; what a crash or a running save has left; a checkpoint that
# lacks something; files that are not this library's, or have lost their manifest.
COMMITTED, PREPARED, INCOMPLETE, DAMAGED, FOREIGN = "committed", "prepared", "incomplete", "damaged", "foreign"
STATES = (COMMITTED, PREPARED, INCOMPLETE, DAMAGED, FOREIGN)
STEP, BUNDLE, SHARDED_DIRECTORY, OBJECTS = "step", "bundle", "sharded", "objects"


@dataclasses.dataclass(frozen=True)
class Row:
    """
    Attributes:
        name: of the directory, below where was looked; or of the folder in a store.
        kind: "step", "bundle", "sharded" (a directory of torch.distributed.checkpoint) or "objects" (a folder in a store).
        created: as manifests have it, UTC; empty if that is not known.
        bytes: of its files: as the manifest says, or as they lie there.
        files: how many.
        problem: what is wrong, in words; else empty.
        latest: whether `latest` names it.
        where: what has become of it on other tiers, by the name of the tier.
        metrics: as they were given to save(), by rank 0.
        cost: see Manifest; of all ranks.
        frees: bytes of the disk that removing it alone would give back; None if that was not looked for, or cannot be told.
    """

    name: str
    kind: str
    state: str
    step: int | None = None
    sequence: int | None = None
    created: str = ""
    bytes: int = 0
    world_size: int | None = None
    files: int = 0
    problem: str = ""
    latest: bool = False
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    cost: dict[str, float] = dataclasses.field(default_factory=dict)
    frees: int | None = None


def row_of(name: str, kind: str, manifest: Manifest, state: str = COMMITTED, problem: str = "") -> Row:
    return Row(
        name=name,
        kind=kind,
        state=state,
        step=manifest.step,
        sequence=manifest.sequence,
        created=manifest.created,
        bytes=manifests.bytes_of(manifest),
        world_size=manifest.world_size,
        files=len(manifest.files),
        problem=problem,
        metrics=dict(manifest.metrics),
        cost=dict(manifest.cost),
    )


def size_below(directory: Path) -> tuple[int, int]:
    """Bytes and number of the files that lie in a directory and below; what goes meanwhile is not counted."""
    size = count = 0
    try:
        for path in directory.iterdir():
            if path.is_symlink() or not path.is_dir():
                size += path.stat().st_size
                count += 1
            else:
                more, others = size_below(path)
                size, count = size + more, count + others
    except OSError:
        pass
    return size, count


def is_hidden(name: str) -> bool:
    """Whether it is no checkpoint's name: of locks, of the drains, of what is on its way out."""
    return name.startswith(".") or temporary_names.is_temporary(name)
