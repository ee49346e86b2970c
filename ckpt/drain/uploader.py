"""The loop of a drain that carries checkpoints from home to an object store: the newest first, or those that a rule wants."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from ckpt.directory import holds
from ckpt.directory.going_back import sequences_at
from ckpt.directory.holds import MOST_HELD, Holds
from ckpt.drain import journal as journals
from ckpt.drain import node as nodes
from ckpt.drain import remote_place
from ckpt.drain.backoff import Backoff
from ckpt.drain.choice import Rules, created_s
from ckpt.drain.coming_home import ComingHome
from ckpt.drain.journal import COMMITTED, COPYING, FAILED, FOLDER, QUEUED, SUPERSEDED, Journal
from ckpt.drain.node import Generation, Generations
from ckpt.drain.pacing import AutoRate, FixedRate, Pace, PaceFile
from ckpt.drain.stopping import Stop, StoppedError
from ckpt.drain.upload import Upload, is_gone, tidy_store
from ckpt.drain.waking import Wakeful
from ckpt.errors import CheckpointError, CorruptError, InUseError, StorageError
from ckpt.remote.layout import Catalogue, move_latest
from ckpt.remote.ownership import OwnedByAnotherError
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.object_store import ObjectStore, ObjectStoreError

logger = logging.getLogger("ckpt")

_POLL_S = 0.05
_IN_USE = "'{directory}' is being worked on by {holder}: end that first, or let it do the work"


class Uploader:
    """Of one home and one URL.

    Args:
        place: see remote_place.py.
        rate: bytes a second; None: what remote.json says.
        options: of the store, beside those that stand in remote.json.

    Attributes:
        failed: whether something that should be in the store is not.
    """

    def __init__(self, place: Path, stop: Stop, rate: int | None = None, options: Mapping[str, str] | None = None) -> None:
        self._place = place
        self._stop = stop
        self._rate = rate
        self._options = dict(options or {})
        self._lock = DirectoryLock(place, name=nodes.LOCK, refusal=_IN_USE, owner="another drain")
        self._backoff = Backoff()
        self._journals: dict[int, Journal] = {}
        self._times: dict[int, float] = {}  # when the checkpoints in the store were made, by sequence
        self._newest = -1  # in the store
        self._entered = False  # the store is ours, and was looked at
        self._replaced = False
        self._warned: set[str] = set()
        self._forgone: set[int] = set()  # sequences of those that were at home no more
        self._held: Holds | None = None
        self.failed = False

    def run(self, *, once: bool) -> None:
        """Until it is asked to end, or nobody trains any more and nothing is left.

        Args:
            once: only until nothing is left that can be done now.

        Raises:
            InUseError: another drain is at work here, and somebody trains; or the job is of another host.
            NotACheckpointError: the directory is none of a place in a store.
            CheckpointError: the store cannot be used with these options.
            StorageError: the directory cannot be written to; or obstore is missing.
        """
        self._remote = remote_place.read(self._place)
        self._pids = self._remote.pids
        self._take_lock(once)
        try:
            durable.make_directory(self._place / FOLDER, durable=True)
            self._store = self._open_store()
            self._catalogue = Catalogue(self._store)
            self._generations = Generations(self._remote.home)
            self._coming = ComingHome(self._remote.home)
            self._journals = {journal.sequence: journal for journal in journals.read_all(self._place)}
            for journal in self._journals.values():
                if journal.state == FAILED and journal.errno:
                    journal.change(QUEUED, next=None)
            self._pace = self._make_pace()
            wakeful = Wakeful(self._place, self._stop)
            while not (self._stop.requested or self._replaced):
                wakeful.look()
                trained = self._remote.is_trained()  # before the look: nothing is saved behind it then
                if self._round():
                    continue
                if once or self._may_end(trained):
                    break
                wakeful.wait()
            self.failed = self._has_failed()
            self._leave()
        finally:
            self._lock.release()

    def _open_store(self) -> ObjectStore:
        try:
            return ObjectStore(self._remote.url, {**self._remote.options, **self._options})
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def _take_lock(self, once: bool) -> None:
        while True:
            try:
                return self._lock.acquire()
            except InUseError:
                remote = self._remote
                if not once or self._stop.requested or remote.is_trained() or not remote.is_here:
                    raise
                self._stop.sleep(_POLL_S)

    def _make_pace(self) -> Pace:
        rate = self._remote.rate if self._rate is None else self._rate
        if rate is not None:
            return FixedRate(rate, self._stop.sleep)
        page = PaceFile(self._remote.pace, lambda: self._remote.is_trained())
        return AutoRate(page.read, self._stop.sleep)

    def _has_failed(self) -> bool:
        failed = [journal.sequence for journal in self._journals.values() if journal.state == FAILED]
        return self._backoff.failures > 0 or max(failed, default=-1) > self._newest

    def _leave(self) -> None:
        """Of checkpoints to come nobody wants any, unless somebody trains, who starts a drain again."""
        if self._remote.is_here and not self._remote.is_trained() and self._held is not None:
            holds.write(self._place, Holds(self._held.decided, self._held.held))

    def _may_end(self, trained: bool) -> bool:
        if trained:
            self._coming.reset()
            return False
        return not any(journal.waits for journal in self._journals.values()) and not self._coming.may_go_on()

    # ---- one round -------------------------------------------------------------------------------------------------

    def _round(self) -> bool:
        """Whether anything was carried."""
        self._look_at_description()
        journals.write_again(self._journals.values())
        try:
            generations = self._generations.find()
        except StorageError as error:
            self._warn_once(f"'{self._remote.home}' cannot be read: {error}")
            return False
        if not self._place.is_dir():
            self._warn_once(f"'{self._remote.home}' is away: nothing is carried from there until it comes back")
            return False
        journals.follow(self._journals, generations, self._make_journal, self._forgo)
        self._take_up(generations)
        entered = self._enter(generations)
        waiting = self._choose(generations) if entered else [each for each in generations if self._waits(each)][:MOST_HELD]
        waiting.sort(key=lambda each: self._journals[each.sequence].state != COPYING)  # what was begun goes on
        self._hold(generations, waiting)
        if not entered or not waiting or self._backoff.waits:
            return False
        self._carry(waiting[0])
        return True

    def _look_at_description(self) -> None:
        """The job may have changed its mind, or be another process by now."""
        with contextlib.suppress(CheckpointError):
            before, self._remote = self._remote, remote_place.read(self._place)
            if self._remote.rate != before.rate:
                self._pace = self._make_pace()
            # Another process of the job starts a drain of its own, with the options that it has been given.
            self._replaced = self._remote.pids != self._pids
            if (self._remote.owner, self._remote.ticket) != (before.owner, before.ticket):
                self._entered = False

    def _make_journal(self, generation: Generation) -> Journal:
        path = journals.path_of(self._place, generation.sequence)
        return Journal(path, generation.sequence, generation.manifest.step, generation.identity)

    def _forgo(self, journal: Journal, newest: int) -> None:
        """It is not at home any more: the step was saved again, or newer ones have come."""
        if newest > journal.sequence:
            journal.change(SUPERSEDED, by=newest)
        else:
            self._forgone.add(journal.sequence)
            journal.change(FAILED, next=None, errno=errno.ENOENT, text=f"it is not in '{self._remote.home}' any more")
            logger.warning("step %d is not carried to '%s': %s", journal.step, self._remote.url, journal.text)

    def _take_up(self, generations: list[Generation]) -> None:
        """What was not at home, and is there again."""
        for generation in generations:
            if generation.sequence in self._forgone:
                self._forgone.discard(generation.sequence)
                self._journals[generation.sequence].change(QUEUED, errno=0, text="", ended=0.0)

    def _waits(self, generation: Generation) -> bool:
        return self._journals[generation.sequence].waits

    def _choose(self, generations: list[Generation]) -> list[Generation]:
        """Those to be carried, newest first; all others that wait are superseded. Few: home must keep them as long."""
        waiting = [each for each in generations if self._waits(each)]
        ruled = self._remote.every_steps is not None or self._remote.every_s is not None
        if ruled:
            wanted = Rules(self._remote, self._times.values()).wanted(waiting)
            begun = {each.sequence for each in waiting if self._journals[each.sequence].state == COPYING}
            eligible = [each for each in waiting if each.sequence in wanted | begun]
        else:
            eligible = [each for each in waiting if each.sequence > self._newest]
        chosen = eligible[:MOST_HELD]
        kept = {each.sequence for each in chosen}
        for each in waiting:
            if each.sequence not in kept:
                by = self._newest if self._newest > each.sequence else next((c.sequence for c in chosen), 0)
                unwanted = ruled and each not in eligible
                self._journals[each.sequence].change(SUPERSEDED, by=0 if unwanted else by)
        return chosen

    def _hold(self, generations: list[Generation], waiting: list[Generation]) -> None:
        decided = tuple(each.sequence for each in generations)
        held = tuple(each.sequence for each in waiting)
        remote = self._remote
        wanted = Holds(decided, held, remote.every_steps, all_others=remote.every_s is not None)
        if wanted != self._held and holds.write(self._place, wanted):  # else it is tried again at the next look
            self._held = wanted

    # ---- the store -------------------------------------------------------------------------------------------------

    def _enter(self, generations: list[Generation]) -> bool:
        """Whether the store is ours, and what lies there is known."""
        waiting = [each for each in generations if self._waits(each)]
        if self._entered or not waiting:
            return self._entered
        if self._backoff.waits:
            return False
        newest = self._journals[waiting[0].sequence]
        try:
            self._ownership = remote_place.claim(self._place, self._remote, self._store)
            copies = self._catalogue.find().copies
            self._finish({copy.folder for copy in copies})
        except (CheckpointError, OSError) as error:
            self._failed(error, newest)
            return False
        self._times = {copy.sequence: created_s(copy.manifest) for copy in copies}
        self._newest = max(self._times, default=-1)
        self._entered = True
        return True

    def _finish(self, folders: set[str]) -> None:
        """What an end behind the commit has left to be done."""
        for journal in self._journals.values():
            if journal.waits and journal.inbox in folders:
                move_latest(self._store, journal.inbox)
                journal.change(COMMITTED)

    def _carry(self, generation: Generation) -> None:
        journal = self._journals[generation.sequence]
        try:
            journal.change(COPYING, began=journal.began or time.time(), next=None, text="", errno=0)
            upload = Upload(self._store, generation, journal, self._pace, self._stop, direct=self._remote.direct_io)
            upload.carry()
            upload.commit(self._ownership)
            self._committed(generation, journal)
        except StoppedError:
            journal.write()
        except CorruptError as error:
            if not is_gone(generation):  # else other files have these names by now
                self._give_up(journal, error)
        except ObjectStoreError as error:
            self._failed(error, journal)
        except StorageError as error:
            if not is_gone(generation):  # else the next round finds that, too
                self._failed(error, journal)
        except CheckpointError as error:
            self._failed(error, journal)

    def _committed(self, generation: Generation, journal: Journal) -> None:
        self._times[generation.sequence] = created_s(generation.manifest)
        self._newest = max(self._newest, generation.sequence)
        journal.change(COMMITTED)
        self._backoff.succeed()
        self._warned.clear()
        try:
            on_their_way = {each.inbox for each in self._journals.values() if each.waits}
            back = sequences_at(self._remote.home)
            left = tidy_store(self._store, self._catalogue, self._remote.keep, back, on_their_way, self._warn_once)
            self._times = {copy.sequence: created_s(copy.manifest) for copy in left.copies} or self._times
        except StorageError as error:  # of the store, or of home, which says what has to stay
            self._warn_once(f"removing what is old from '{self._remote.url}' failed, all checkpoints are good: {error}")

    def _failed(self, error: Exception, journal: Journal) -> None:
        if isinstance(error, OwnedByAnotherError) or getattr(error, "permanent", False) or not isinstance(error, StorageError):
            self._entered = False
            self._give_up(journal, error)
            return
        delay = self._backoff.fail()
        if self._backoff.is_worth_a_word:
            logger.warning(
                "carrying checkpoints to '%s' failed, it is tried again in %.0f s: %s", self._remote.url, delay, error
            )
        code = error.errno or errno.EIO
        journal.change(FAILED, attempts=journal.attempts + 1, next=time.time() + delay, errno=code, text=str(error))

    def _give_up(self, journal: Journal, error: Exception) -> None:
        # With a number it is tried again by the next drain: somebody may have changed what was in the way.
        code = errno.EPERM if isinstance(error, OwnedByAnotherError) else getattr(error, "errno", None) or 0
        journal.change(FAILED, attempts=journal.attempts + 1, next=None, errno=code, text=str(error))
        self._warn_once(f"step {journal.step} was not carried to '{self._remote.url}': {error}", str(error))

    def _warn_once(self, text: str, key: str = "") -> None:
        if (key or text) not in self._warned:
            self._warned.add(key or text)
            logger.warning("%s", text)
