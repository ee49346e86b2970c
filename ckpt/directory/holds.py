"""What must stay at home although newer checkpoints are there, because it is on its way to an object store.

    .remote/<place>/holds.json    what the drain that carries it says; <place> stands for one URL

Whoever removes steps at home reads that. It keeps a few at most, so that a store that is away fills no disk of home. Beside
these places lie those of what jobs have gone back to, in the same form: see going_back.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ckpt.directory.manifest import Manifest
from ckpt.directory.step_names import names_in
from ckpt.errors import StorageError
from ckpt.storage import durable

logger = logging.getLogger("ckpt")

FOLDER = ".remote"
NAME = "holds.json"
BACK = "back-"  # how names of places begin that are no drain's
MOST_HELD = 3  # beyond what home keeps, for each place


@dataclasses.dataclass(frozen=True)
class Holds:
    """
    Attributes:
        decided: sequences at home about which the drain has decided; of others it may want some, also of older ones, which come
            late from nodes.
        held: those of them that it still needs; the first is the one that it is carrying, or will.
        every_steps: it wants those of each n-th step; None: its wishes do not depend on the step.
        all_others: it may want any of the others.
    """

    decided: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    every_steps: int | None = None
    all_others: bool = False

    def want(self, manifest: Manifest) -> bool:
        if manifest.sequence in self.held or manifest.sequence in self.decided:
            return manifest.sequence in self.held
        return self.all_others or (self.every_steps is not None and manifest.step % self.every_steps == 0)

    def choose(self, manifests: Sequence[Manifest]) -> set[int]:
        """Sequences of those that must stay: the one on its way, else none would ever arrive; and the newest that are wanted.

        Args:
            manifests: newest first.
        """
        on_its_way = set(self.held[:1]) & {manifest.sequence for manifest in manifests}
        wanted = [each.sequence for each in manifests if self.want(each) and each.sequence not in on_its_way]
        return on_its_way | set(wanted[: MOST_HELD - len(on_its_way)])


def write(place: Path, holds: Holds) -> bool:
    """Whether it is written. A failure is only logged: what was written before counts on."""
    try:
        content = json.dumps(dataclasses.asdict(holds)).encode()
        durable.replace_quickly(place / NAME, content)
    except StorageError as error:
        logger.warning("what is to stay at home cannot be noted: %s", error)
        return False
    return True


def read(place: Path) -> Holds:
    """Nothing, if it cannot be read."""
    try:
        said = json.loads((place / NAME).read_bytes())
        return Holds(**{**said, "held": tuple(said["held"]), "decided": tuple(said["decided"])})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Holds()


def held_at(home: Path, manifests: Sequence[Manifest]) -> set[int]:
    """Sequences of those that must stay.

    Args:
        manifests: of checkpoints that would be removed, newest first.

    Raises:
        StorageError: home cannot be read.
    """
    found: set[int] = set()
    for name in names_in(home / FOLDER):
        found |= set() if name.startswith(BACK) else read(home / FOLDER / name).choose(manifests)
    return found
