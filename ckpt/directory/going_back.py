"""The step that a job has gone back to stays at home, from before anything is brought there until the job ends.

Drains are told of it by node.json, but that is not written before the first save. So home says it itself:

    .remote/back-<sequence>/holds.json    see holds.py: whoever removes steps at home reads that

All nodes of a job find the same commit, and so write the same. Rank 0 takes it away at the end. What a job leaves that was
killed, the next one removes when it claims home.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ckpt.directory import holds, publish_lock
from ckpt.directory import manifest as manifests
from ckpt.directory.holds import Holds
from ckpt.directory.step_names import step_name
from ckpt.errors import CheckpointError
from ckpt.storage import durable

logger = logging.getLogger("ckpt")

_PREFIX = "back-"


class GoingBack:
    """Of one rank.

    Args:
        leads: whether it is rank 0.
    """

    def __init__(self, home: Path, leads: bool) -> None:
        self._home = home
        self.leads = leads
        self._owner = os.getpid()
        self.places: list[Path] = []  # that this rank has made or found

    def hold_step(self, step: int) -> None:
        """What home has of it now. To be called before a drain may bring something newer."""
        try:
            found = manifests.read_if_any(self._home / step_name(step))
        except (CheckpointError, OSError):
            return  # it is not good: nobody goes back to that
        if found is not None:
            self._hold(found.sequence)

    def pin(self, sequence: int) -> None:
        """That commit was gone back to, which may be on its way home."""
        if self.leads:
            self._hold(sequence)

    def _hold(self, sequence: int) -> None:
        """A failure is only logged."""
        place = self._home / holds.FOLDER / f"{_PREFIX}{sequence:012d}"
        if place in self.places or not publish_lock.is_home(self._home):
            return
        try:
            durable.make_directory(place, durable=False)
            durable.make_directory(self._home / publish_lock.FOLDER, durable=True)
            with publish_lock.publishing(self._home, "Checkpointer"):  # a drain that removes just now has not seen it
                holds.write(place, Holds((sequence,), (sequence,)))
            self.places.append(place)
        except (CheckpointError, OSError) as error:
            logger.warning("home may remove the checkpoint that was gone back to, as keep= says: %s", error)

    def release(self) -> None:
        """At the end."""
        places, self.places = self.places, []
        for place in places if self.leads and os.getpid() == self._owner else ():
            remove(place)


def remove(place: Path) -> None:
    """What home keeps for this place it keeps no more."""
    durable.remove_quietly(place / holds.NAME)
    if place.name.startswith(_PREFIX):
        durable.remove_if_empty(place)
