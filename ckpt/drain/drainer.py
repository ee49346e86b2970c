"""The loop of a drain: it looks what is complete on its node, carries the newest home, and removes what is wanted no more."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.going_back import sequences_at
from ckpt.directory.listing import find_steps
from ckpt.directory.manifest import Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.directory.receipts import place_in
from ckpt.directory.step_names import name_at_home, step_name
from ckpt.drain import journal as journals
from ckpt.drain import node as nodes
from ckpt.drain.backoff import Backoff, is_permanent
from ckpt.drain.choice import Rules, created_s, newest_of_each, next_one, superseded
from ckpt.drain.copying import SourceError
from ckpt.drain.delivery import deliver
from ckpt.drain.home import Home, OutdoneError
from ckpt.drain.journal import COMMITTED, COPIED, COPYING, FAILED, FOLDER, QUEUED, SUPERSEDED, Journal
from ckpt.drain.node import Generation, Generations, NodeRetention
from ckpt.drain.others import Failure, Silence, read_failure, take_back_failure
from ckpt.drain.pacing import AutoRate, FixedRate, Pace, PaceFile
from ckpt.drain.serving import Server
from ckpt.drain.stopping import Stop, StoppedError
from ckpt.drain.stranded import Stranded
from ckpt.drain.waking import Wakeful
from ckpt.errors import CheckpointError, InUseError, StorageError
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.log_file import stamp_of

logger = logging.getLogger("ckpt")

_POLL_S = 0.05
_PATIENCE_S = 600.0  # for other nodes, once nobody trains here any more
_IN_USE = "'{directory}' is being drained by {holder}: end that first, or let it do the work"


class Drainer:
    """Of one node and run.

    Args:
        root: the directory of the run on the node.
        rate: bytes a second; None: what node.json says.
        rebuild: home was lost: it is made anew, and gets what lies here once more.
        told: called with a step and its directory at home, as soon as it is a checkpoint there.

    Attributes:
        failed: whether something could not be carried home, and is not superseded.
    """

    def __init__(
        self,
        root: Path,
        stop: Stop,
        rate: int | None = None,
        *,
        rebuild: bool = False,
        told: Callable[[int, Path], object] = lambda step, path: None,
    ) -> None:
        self._root = root
        self._stop = stop
        self._rate = rate
        self._rebuild = rebuild
        self._told = told
        self._lock = DirectoryLock(root, name=nodes.LOCK, refusal=_IN_USE, owner="another drain")
        self._generations = Generations(root)
        self._retention = NodeRetention(root)
        self._backoff = Backoff()
        self._journals: dict[int, Journal] = {}
        self._newest_at_home = -1
        self._at_home: list[Manifest] = []
        self._back: set[int] = set()  # what jobs have gone back to, as far as home has been asked
        self._asks_back = True  # somebody may have restored: home is to be asked, though nothing may be left to carry
        self._alone_since: float | None = None
        self._stranded = Stranded()
        self._server: Server | None = None
        self._unserved: set[str] = set()  # why this node could not be served, as far as it was told
        self.failed = False

    def run(self, *, once: bool) -> None:
        """Until it is asked to end, or nobody trains any more and nothing is left.

        Args:
            once: only until nothing is left that can be done now.

        Raises:
            InUseError: another drain is at work here, and somebody trains; with `once`, one that nobody trains beside is waited
                for, since it ends by itself.
            NotACheckpointError: the directory is none of a run.
            StorageError: it cannot be written to.
        """
        self._node = nodes.read(self._root)
        if self._rebuild:
            Home(self._node).rebuild()  # before it waits for a drain that waits for home
        self._take_lock(once)
        try:
            durable.make_directory(self._root / FOLDER, durable=True)
            self._retention.remove_retired()
            self._journals = {journal.sequence: journal for journal in journals.read_all(self._root)}
            self._restored = self._restore_time()
            self._try_again()
            if self._rebuild:
                self._begin_lost_anew(Home(self._node))
            self._pace = self._make_pace()
            self._silence = Silence(Home(self._node).inboxes)
            wakeful = Wakeful(self._root, self._stop)
            while not self._stop.requested:
                if not once:
                    self._serve()
                wakeful.look()
                if self._round():
                    continue
                if once or self._may_end():
                    break
                wakeful.wait()
            self._tell_stranded()
            self.failed = self._has_failed()
        finally:
            self._stop_serving()
            self._lock.release()

    def _try_again(self) -> None:
        """What failed: somebody may have changed what was in the way."""
        for journal in self._journals.values():
            if journal.blocked:
                journal.change(COPIED, blocked=False, errno=0, text="")
            elif journal.state == FAILED and journal.errno:
                journal.change(QUEUED, next=None)

    def _begin_lost_anew(self, home: Home) -> None:
        """What was there, or was not wanted there any more. Which of it is wanted now, others decide, as ever."""
        for journal in self._journals.values():
            if self._was_left(home, journal):
                journal.change(QUEUED, inbox="", by=0, ended=0.0)

    def _take_lock(self, once: bool) -> None:
        while True:
            try:
                return self._lock.acquire()
            except InUseError:
                if not once or self._stop.requested or self._node.is_trained():
                    raise
                self._stop.sleep(_POLL_S)

    def _has_failed(self) -> bool:
        committed = [journal.sequence for journal in self._journals.values() if journal.state == COMMITTED]
        failed = [journal.sequence for journal in self._journals.values() if journal.state == FAILED]
        return self._backoff.failures > 0 or max(failed, default=-1) > max([self._newest_at_home, *committed])

    def _make_pace(self) -> Pace:
        rate = self._node.rate if self._rate is None else self._rate
        if rate is not None:
            return FixedRate(rate, self._stop.sleep)
        page = PaceFile(self._root / self._node.pace, lambda: self._node.is_trained())
        return AutoRate(page.read, self._stop.sleep)

    # ---- serving other nodes ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """What lies here, as long as this drain lives, if there are other nodes."""
        node = self._node
        if node.place.count == 1 or (self._server is not None and self._server.address != node.address):
            self._stop_serving()
        if node.place.count == 1 or self._backoff.waits or f"at {node.address}" in self._unserved:
            return
        try:
            if self._server is None:
                self._server = Server(self._root, node)
            self._server.announce(node)
        except CheckpointError as error:  # home may come back
            self._tell_unserved(str(error), error)
        except OSError as error:
            self._tell_unserved(f"at {node.address}", error)

    def _tell_unserved(self, key: str, error: Exception) -> None:
        if key not in self._unserved:
            self._unserved.add(key)
            logger.warning("other nodes cannot fetch from '%s', and restore from home what they lack: %s", self._root, error)

    def _stop_serving(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _restore_time(self) -> tuple[int, ...] | None:
        """Another one each time that somebody begins to restore."""
        return stamp_of(self._root / nodes.RESTORING)

    def _may_end(self) -> bool:
        if self._node.is_trained() or nodes.is_restored(self._root):
            self._alone_since = None
            return False
        if self._alone_since is None:
            self._alone_since = time.monotonic()
        if any(journal.waits for journal in self._journals.values()):
            return False
        delivered = any(journal.state == COPIED for journal in self._journals.values())
        return not delivered or time.monotonic() - self._alone_since > _PATIENCE_S

    # ---- one round -------------------------------------------------------------------------------------------------

    def _round(self) -> bool:
        """Whether anything was carried."""
        self._look_at_description()
        journals.write_again(self._journals.values())
        self._tell_stranded()
        before, self._restored = self._restored, self._restore_time()
        if before != self._restored:  # a job that was started again: whoever did that may have mended something
            self._try_again()
            self._backoff.succeed()
            self._asks_back = True
        generations = self._generations.find()
        home, opened = Home(self._node), list[int]()
        journals.follow(
            self._journals, generations, self._make_journal, lambda journal, _: self._forgo(journal, home, generations)
        )
        if self._asks_back and not self._backoff.waits:
            self._ask_back(home)
        if not self._backoff.waits and any(not journal.is_over or journal.blocked for journal in self._journals.values()):
            try:
                self._settle(home)
                opened = [sequence for sequence in home.opened() if self._is_missed(home, sequence)]
            except CheckpointError as error:
                newest = next(iter(self._waiting(generations)), None)  # in whose journal who waits finds the cause
                self._home_failed(error, None if newest is None else self._journals[newest.sequence])
        wanted = self._wanted(self._waiting(generations))
        self._supersede(generations, wanted, opened)
        self._retain(generations)
        waiting = self._waiting(generations)
        delivered = [each for each in generations if self._journals[each.sequence].state == COPIED]
        unwanted = {each.sequence for each in delivered} - self._wanted(delivered)
        chosen = next_one(waiting, self._journals, wanted, opened, unwanted)
        if chosen is None or self._backoff.waits:
            return False
        self._carry(chosen, home, chosen.sequence in wanted)
        return True

    def _tell_stranded(self) -> None:
        """At home, of what the node does not take, as far as that is possible."""
        if self._stranded.has_work(self._journals.values()) and not self._backoff.waits:
            with contextlib.suppress(CheckpointError, OSError):
                home = Home(self._node)
                home.expect_ours()
                self._stranded.keep(home.inboxes, self._node.place.number, self._journals.values())

    def _look_at_description(self) -> None:
        """The job may have changed its mind, or be another process by now."""
        with contextlib.suppress(CheckpointError):
            before, self._node = self._node, nodes.read(self._root)
            if self._node.rate != before.rate:
                self._pace = self._make_pace()

    def _waiting(self, generations: list[Generation]) -> list[Generation]:
        return [each for each in generations if self._journals[each.sequence].waits]

    def _wanted(self, generations: list[Generation]) -> set[int]:
        """By a rule: sequences."""
        return self._rules().wanted(newest_of_each(generations))

    def _rules(self) -> Rules:
        keeping = self._node.home_keeping.with_pinned(*self._back)
        return Rules(self._node, map(created_s, self._at_home), keeping, self._at_home)

    def _is_missed(self, home: Home, sequence: int) -> bool:
        """Whether other nodes deliver it, and this one has not."""
        journal = self._journals.get(sequence)
        place = None if journal is None else self._place_of(journal)
        return place is not None and place.count > 1 and not home.has_receipt(sequence, place.number)

    def _place_of(self, journal: Journal) -> NodePlace:
        """The job that saves here now may have other nodes, and other ranks on them."""
        return journal.place or self._node.place

    def _make_journal(self, generation: Generation) -> Journal:
        sequence, manifest = generation.sequence, generation.manifest
        place = place_in(generation.directory, manifest) or self._node.place
        path, name = journals.path_of(self._root, sequence), name_at_home(manifest)
        return Journal(path, sequence, manifest.step, generation.identity, place, name=name)

    def _forgo(self, journal: Journal, home: Home, generations: list[Generation]) -> None:
        """Its files are gone: it was saved again, or somebody has removed it."""
        name, sequence = journal.name_at_home, journal.sequence
        by = next((each.sequence for each in generations if name_at_home(each.manifest) == name), -1)
        try:
            by = by if by > sequence else home.newest_instead(name, sequence, is_step=name == step_name(journal.step))
        except CheckpointError:
            return  # as long as home cannot be asked
        if by == sequence:
            journal.change(COMMITTED)
        elif by > sequence:
            journal.change(SUPERSEDED, by=by)
        else:
            text = "its files are not on the node any more"
            journal.change(FAILED, next=None, errno=errno.ENOENT, text=text)
            logger.warning("step %d is not carried home: %s", journal.step, text)
            self._tell_others(journal)

    def _supersede(self, generations: list[Generation], wanted: set[int], opened: list[int]) -> None:
        waiting = self._waiting(generations)
        for sequence, by in superseded(waiting, self._journals, wanted, opened, self._newest_at_home).items():
            self._journals[sequence].change(SUPERSEDED, by=by)

    def _retain(self, generations: list[Generation]) -> None:
        """Never the newest, nor one that is still on its way, nor what may just be restored."""
        if self._node.keep is not None and not nodes.is_restored(self._root):
            beyond = generations[self._node.keep :]
            self._retention.retire([each for each in beyond if self._journals[each.sequence].is_over])

    # ---- home ------------------------------------------------------------------------------------------------------

    def _settle(self, home: Home) -> None:
        """What has become of that to which this node has delivered its part.

        Raises:
            StorageError, InUseError: home cannot be asked now.
        """
        home.expect_ours()
        self._look_back(home)
        checkpoints = find_steps(home.path).checkpoints
        self._newest_at_home = max((manifest.sequence for _, manifest in checkpoints), default=-1)
        self._at_home = [manifest for _, manifest in checkpoints]
        delivered = [each for each in self._journals.values() if each.state == COPIED or each.blocked]
        for journal in sorted(delivered, key=lambda each: each.sequence, reverse=True):
            try:
                self._settle_one(home, journal)
            except OutdoneError as error:
                journal.change(SUPERSEDED, by=error.by, blocked=False)
            except (StorageError, InUseError):
                raise
            except CheckpointError as error:
                self._give_up(journal, error)

    def _ask_back(self, home: Home) -> None:
        """As long as somebody restores, and once more."""
        with contextlib.suppress(CheckpointError):
            asks_again = nodes.is_restored(self._root)
            home.expect_ours()
            self._look_back(home)
            self._asks_back = asks_again

    def _look_back(self, home: Home) -> None:
        """What a job has gone back to is to be at home, also if it was not wanted there before, or was tidied there."""
        before, self._back = self._back, sequences_at(home.path)
        for journal in (self._journals[sequence] for sequence in self._back - before if sequence in self._journals):
            if self._is_here(journal) and self._was_left(home, journal):
                journal.change(QUEUED, inbox="", by=0, ended=0.0)

    def _is_here(self, journal: Journal) -> bool:
        return manifests.is_at(self._root / step_name(journal.step), journal.sequence)

    @staticmethod
    def _was_left(home: Home, journal: Journal) -> bool:
        """Whether it is not at home, and nobody is to bring it there."""
        return journal.state in (COMMITTED, SUPERSEDED) and not home.is_committed(journal.name_at_home, journal.sequence)

    def _settle_one(self, home: Home, journal: Journal) -> None:
        def wants(manifest: Manifest) -> bool:
            return self._rules().want(manifest)

        sequence, place, name = journal.sequence, self._place_of(journal), journal.name_at_home
        if not home.is_committed(name, sequence):
            delivered = home.has_receipt(sequence, place.number)
            if not (delivered and home.commit(sequence, place, wants)) and not home.is_committed(name, sequence):
                manifest = home.manifest_of(sequence)
                if manifest is None or not delivered:
                    journal.change(QUEUED, inbox="", blocked=False)  # who decides what is wanted decides about it, too
                elif self._newest_at_home > sequence and not wants(manifest):
                    raise OutdoneError(self._newest_at_home)
                else:
                    self._look_at_others(home, journal, place)
                return
        home.finish(name, sequence)
        durable.crash_point("drain-committed")
        self._newest_at_home = max(self._newest_at_home, journal.sequence)
        journal.change(COMMITTED, blocked=False, errno=0, text="")
        self._told(journal.step, home.path / name)
        self._backoff.succeed()

    def _look_at_others(self, home: Home, journal: Journal, place: NodePlace) -> None:
        """Of what this node has delivered: who waits for it is not to wait for a node that has given up, or is silent."""
        missing, waited_s = home.missing(journal.sequence, place), time.time() - journal.ended
        failure = read_failure(home.inbox_of(journal.sequence), missing) or self._silence.failure(place, missing, waited_s)
        if failure is None:
            if journal.blocked:
                journal.change(COPIED, blocked=False, errno=0, text="")
        elif missing and not (journal.blocked and journal.text == failure.text):
            journal.change(FAILED, next=None, blocked=True, errno=failure.errno, text=failure.text)
            logger.error("step %d does not come home: %s", journal.step, failure.text)

    def _carry(self, generation: Generation, home: Home, wanted: bool) -> None:
        journal = self._journals[generation.sequence]
        place, direct = self._place_of(journal), self._node.direct_io
        try:
            home.expect_ours()
            journal.change(COPYING, began=journal.began or time.time(), next=None, text="", errno=0)
            take_back_failure(home.inbox_of(generation.sequence), place.number)
            receipt = deliver(generation, place, home, journal, self._pace, self._stop, direct=direct, wanted=wanted)
            self._settle(home)  # what was committed may be removed at home as soon as this one can be
            home.write_receipt(generation.sequence, journal.inbox, place.number, receipt)
            durable.crash_point("drain-delivered")
            journal.change(COPIED, ended=time.time())
            self._backoff.succeed()
        except StoppedError:
            journal.write()
        except OutdoneError as error:
            journal.change(SUPERSEDED, by=error.by)
        except SourceError as error:
            self._give_up(journal, error)
        except (StorageError, InUseError) as error:
            if getattr(error, "errno", None) == errno.ENOENT and not wanted and self._is_outdone(generation, home):
                journal.change(SUPERSEDED, by=self._newest_at_home)  # who has committed that has taken the inbox away
            else:
                self._home_failed(error, journal)
        except CheckpointError as error:
            if nodes.still_there(generation):
                self._give_up(journal, error)
            # else the next round finds that it is gone

    def _is_outdone(self, generation: Generation, home: Home) -> bool:
        with contextlib.suppress(StorageError, InUseError):
            self._settle(home)
        return self._newest_at_home > generation.sequence

    def _home_failed(self, error: CheckpointError, journal: Journal | None = None) -> None:
        code = getattr(error, "errno", None) or 0
        if journal is not None and is_permanent(code):
            self._give_up(journal, error)
            return
        delay = self._backoff.fail()
        if self._backoff.is_worth_a_word:
            logger.warning("carrying checkpoints home failed, it is tried again in %.0f s: %s", delay, error)
        if journal is not None:
            journal.change(FAILED, attempts=journal.attempts + 1, next=time.time() + delay, errno=code, text=str(error))

    def _give_up(self, journal: Journal, error: CheckpointError) -> None:
        code = getattr(error, "errno", None) or 0
        journal.change(FAILED, attempts=journal.attempts + 1, next=None, errno=code, text=str(error), blocked=False)
        logger.error("step %d was not carried home: %s", journal.step, error)
        self._tell_others(journal)

    def _tell_others(self, journal: Journal) -> None:
        """They cannot have it at home either. Where this node cannot write, they find that it is silent."""
        place = self._place_of(journal)
        if place.count > 1:
            with contextlib.suppress(CheckpointError):
                home = Home(self._node)
                home.expect_ours()
                home.note_failure(journal.sequence, place.number, Failure(journal.text, journal.errno))
