"""The runs that lie on the disk of a node, each in a directory of its own; and those whose home has lost its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ckpt.directory.listing import find_steps
from ckpt.directory.run_file import find_run
from ckpt.directory.step_names import names_in
from ckpt.drain import node as nodes
from ckpt.errors import CheckpointError


class NodeRun(NamedTuple):
    """
    Attributes:
        root: its directory.
        newest: the step that was committed last there; None if nothing is.
        bundle: what that is called at home, if not by its step; else empty.
    """

    root: Path
    home: Path
    newest: int | None
    bundle: str = ""

    def __str__(self) -> str:
        newest = f"newest '{self.bundle}'" if self.bundle else f"newest step {self.newest}"
        what = "nothing complete" if self.newest is None else newest
        return f"'{self.root}', of '{self.home}': {what}"


def find_runs(base: Path) -> list[NodeRun]:
    """Those on a disk, in the order of their names. What cannot be read is none.

    Args:
        base: of the tier, in which the runs lie.

    Raises:
        StorageError: it cannot be read.
    """
    found = []
    for name in sorted(names_in(base) if base.is_dir() else ()):
        try:
            home = nodes.read(base / name).home
            newest = next((manifest for _, manifest in find_steps(base / name).checkpoints), None)
        except (CheckpointError, OSError):
            continue
        step, bundle = (None, "") if newest is None else (newest.step, newest.bundle)
        found.append(NodeRun(base / name, home, step, bundle))
    return found


def describe_lost_home(base: Path, home: Path) -> str:
    """What to say if `home` names no run, but checkpoints of it lie here; empty if all is well.

    Raises:
        CheckpointError: that cannot be found out.
    """
    if find_run(home) is not None:
        return ""
    lost = [run for run in find_runs(base) if run.newest is not None and _is_same(run.home, home)]
    if not lost:
        return ""
    roots = " and ".join(f"'{run.root}'" for run in lost)
    found = "; ".join(str(run) for run in lost)
    return (
        f"'{home}' names no run, but checkpoints of it lie on this node ({found}): it was removed, or its file system is not "
        f"mounted. Mount it; or bring back what the nodes have, by `python -m ckpt drain --once --rebuild {lost[-1].root}` on "
        f"each of them, and start again; or, to begin anew, remove {roots} on each node"
    )


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
