"""Where else the checkpoints of a directory are: at home, on the node that was looked at, in an object store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ckpt.directory.holds import FOLDER
from ckpt.directory.listing import find_steps
from ckpt.directory.step_names import names_in
from ckpt.drain import node as nodes
from ckpt.drain import remote_place, status
from ckpt.drain.journal import COMMITTED
from ckpt.errors import CheckpointError
from ckpt.upkeep.rows import Row

HOME = "home"


def add_tiers(rows: Sequence[Row], directory: Path) -> list[Row]:
    """Of a home: what its drains to object stores have noted, by the URL. Of a node: what its drain has noted about home, and
    whether home has it still. Nothing is asked of a store.

    Raises:
        StorageError: a directory of notes cannot be read.
    """
    found: dict[str, dict[int, str]] = {}
    if (directory / nodes.NAME).exists():
        found[HOME] = _at_home(directory)
    for place in sorted(names_in(directory / FOLDER)):
        remote = remote_place.read_if_any(directory / FOLDER / place)
        if remote is not None:
            found[remote.url] = _noted(directory / FOLDER / place)
    return [_with(row, found) for row in rows]


def _with(row: Row, found: dict[str, dict[int, str]]) -> Row:
    if row.sequence is None:
        return row
    return dataclasses.replace(row, where={tier: states.get(row.sequence, "not yet") for tier, states in found.items()})


def _noted(root: Path) -> dict[int, str]:
    return {each.sequence: each.state for each in status(root)}


def _at_home(root: Path) -> dict[int, str]:
    noted = _noted(root)
    try:
        there = {manifest.sequence for _, manifest in find_steps(nodes.read(root).home).checkpoints}
    except CheckpointError:
        return noted
    gone = {sequence: "removed" for sequence, state in noted.items() if state == COMMITTED and sequence not in there}
    return noted | gone
