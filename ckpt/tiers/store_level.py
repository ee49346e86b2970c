"""What a Checkpointer has of an object store: who carries checkpoints there, and what has become of each.

Nothing of a save waits for the store: once it is a checkpoint at home, the drain that rank 0 has started finds it there. Each
rank reads in the journals of that, which lie at home, what has become of its saves.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ckpt.directory import holds
from ckpt.directory import manifest as manifests
from ckpt.directory.holds import Holds
from ckpt.directory.run_file import find_run
from ckpt.directory.steps import StepDirectories
from ckpt.drain import backlog, remote_place
from ckpt.drain.journal import FOLDER, Journal
from ckpt.drain.remote_place import PACE, Remote, new_name, place_of
from ckpt.drain.waking import WAKE
from ckpt.errors import CheckpointError, ClosedError, FailedSavesError, SkippedError, StorageError, SupersededError
from ckpt.fence import follow, unfollow
from ckpt.metrics.noting import note_commit
from ckpt.metrics.registry import PROCESS, Reading
from ckpt.options import Options
from ckpt.restore.remote_copies import RemoteCopies
from ckpt.saving.task import SaveTask
from ckpt.storage import durable
from ckpt.storage.log_file import touch
from ckpt.tiers.drain_process import DrainProcess
from ckpt.tiers.home_watch import Awaited, HomeWatch
from ckpt.tiers.node_storage import this_process
from ckpt.tiers.pace import TrainingPace
from ckpt.tiers.tier import OBJECT, Tier

logger = logging.getLogger("ckpt")

_LOOK_FOR_EACH_RANK_S = 0.05  # many ranks look less often: all read the same small files at home


class _Way(NamedTuple):
    """From home to the store, as HomeWatch wants it."""

    root: Path
    home: str
    directory: Path

    def step_directory(self, name: str) -> Path:
        return self.directory / name


class UploadWatch(HomeWatch):
    here = "at home"
    tier = OBJECT

    def place_of(self, each: Awaited) -> str:
        return f"{self._storage.home}/{each.inbox}"

    def is_there(self, each: Awaited) -> bool:
        return False

    def is_outdone(self, each: Awaited) -> bool:
        return False

    def read_end(self, each: Awaited) -> None:
        return None

    def can_be_told(self, each: Awaited) -> bool:
        return self._storage.root.is_dir()  # it lies at home, which may be away

    def superseded(self, each: Awaited, by: int) -> SupersededError:
        lost = f"step {each.step} is a checkpoint at home, but was not carried to '{self._storage.home}'"
        if by == 0:
            return SupersededError(f"{lost}: Tier.remote(every=) does not want it", each.step)
        there = manifests.read_if_any(self._storage.step_directory(each.name))
        if there is not None and there.sequence > each.sequence:
            return SupersededError(f"{lost}: it was saved again meanwhile", each.step, each.step)
        return SupersededError(f"{lost}: a newer checkpoint has taken its place", each.step)

    def failed(self, each: Awaited, journal: Journal) -> CheckpointError:
        text = f"step {each.step} was not carried to '{self._storage.home}', but is a checkpoint at home: {journal.text}"
        return StorageError(journal.errno, text, str(self._storage.home)) if journal.errno else CheckpointError(text)


class StoreLevel:
    """
    Args:
        home: from which checkpoints are carried.
        copies: what a restore knows of the store.

    Attributes:
        place: see remote_place.py.
    """

    def __init__(
        self, tier: Tier, home: StepDirectories, rank: int, world_size: int, options: Options, copies: RemoteCopies
    ) -> None:
        self.tier = tier
        self._home = home
        self._rank = rank
        self._options = options
        self._copies = copies
        self.place = place_of(home.path, tier.url)
        self._drain = DrainProcess(self.place, tier.options) if rank == 0 else None
        way = _Way(self.place, tier.url, home.path)
        self._watch = UploadWatch(way, self._drain, max(1.0, world_size * _LOOK_FOR_EACH_RANK_S))
        self._pace = TrainingPace(lambda: self._watch.awaits_any)
        self._numbered = False  # commits have numbers that the store has not
        self._entered = False
        self._failure: CheckpointError | None = None  # of an upload, for good, that nobody was told of yet

    def begin(self) -> None:
        """On rank 0, before each save; home is ours.

        Raises:
            FailedSavesError: a checkpoint was not carried, and the tier is required.
            CheckpointError: numbers cannot be reserved at home; or the tier is required, and nobody can carry there.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            if self.tier.required:
                raise FailedSavesError(f"{failure}. Tier.remote() is required: this save was not begun") from failure
            logger.warning("%s. Until that is mended checkpoints are at home alone", failure)
        if self._entered:
            return
        if not self._numbered:
            self._home.reserve_above_seen()
            self._numbered = True
        try:
            self._enter()
            self._entered = True
        except CheckpointError as error:
            if self.tier.required:
                raise
            logger.warning("nothing is carried to '%s' yet: %s", self.tier.url, error)

    def _enter(self) -> None:
        """On rank 0: the drain is told what to do, and started."""
        durable.make_directory(self.place / FOLDER, durable=True)
        before = remote_place.read_if_any(self.place)
        # The name of the run outlives all else that home knows: a home that was made anew from its nodes is still the same.
        owner = (find_run(self._home.path) or new_name()) if before is None else before.owner
        instead_of, ticket = ("", "") if before is None else (before.instead_of, before.ticket)
        if self._copies.owner not in ("", owner):  # what lies there was looked at by this job's restore
            instead_of, ticket = self._copies.owner, new_name()
        tier = self.tier
        remote_place.write(
            self.place,
            Remote(
                url=tier.url,
                home=self._home.path,
                owner=owner,
                instead_of=instead_of,
                ticket=ticket,
                keep=tier.keep,
                every_steps=tier.every_steps,
                every_s=tier.every_s,
                rate=tier.rate_bytes,
                direct_io=self._options.direct_io,
                pace=self.place / PACE,
                pids=this_process(),
                options=tier.options,
                host=socket.gethostname(),
            ),
        )
        there = tuple(manifest.sequence for _, manifest in self._home.committed().checkpoints)
        held = holds.read(self.place).held
        holds.write(self.place, Holds(there, held, tier.every_steps, all_others=tier.every_s is not None))
        assert self._drain is not None
        in_the_way = self._drain.ensure()  # which is told already
        if in_the_way and tier.required:
            raise CheckpointError(f"{in_the_way}. Tier.remote() is required: this save was not begun")
        self._pace.begin(self.place / PACE)
        follow(self._pace)
        PROCESS.watch(self._gauges)

    def carry(self, task: SaveTask, sequence: int) -> None:
        """It is a checkpoint at home."""
        if self._rank == 0:
            touch(self.place / FOLDER / WAKE)
        assert task.step is not None
        done = functools.partial(self._note_arrival, task, sequence)
        try:
            fail = functools.partial(self._note_failure, task)
            self._watch.watch(sequence, task.step, task.path.name, done, fail, note=task.note)
        except ClosedError as error:
            task.later[OBJECT].set_exception(error)

    def _note_arrival(self, task: SaveTask, sequence: int, place: str) -> None:
        note_commit(OBJECT, task.step)
        task.note("commit", tier=OBJECT, step=task.step, sequence=sequence)
        task.reach_later(OBJECT, place)

    def _gauges(self) -> Iterator[Reading]:
        return backlog.gauges(self.place, OBJECT)

    def _note_failure(self, task: SaveTask, error: CheckpointError) -> None:
        task.later[OBJECT].set_exception(error)
        if not isinstance(error, SkippedError | TimeoutError):
            self._failure = error

    def close(self) -> None:
        """What is not in the store yet is carried there by the drain, all the same."""
        unfollow(self._pace)
        self._pace.close()
        self._watch.close(0.0)
