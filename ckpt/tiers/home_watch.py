"""Tells saves that lie on the disk of their node what has become of them: home, superseded, or failed.

The drain notes that in journals, one for each generation; a thread looks at those that somebody waits for. It also starts the
drain again if that has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from ckpt.directory import manifest as manifests
from ckpt.directory.listing import find_steps, newest_after
from ckpt.directory.publish_lock import FOLDER
from ckpt.directory.run_file import find_run
from ckpt.drain import journal as journals
from ckpt.drain import stranded
from ckpt.drain.bundle_arrival import has_settled
from ckpt.drain.journal import COMMITTED, FAILED, SUPERSEDED, Journal
from ckpt.drain.node import DAMAGED
from ckpt.errors import (
    CheckpointError,
    ClosedError,
    CorruptError,
    DeadlineError,
    ForkedError,
    StorageError,
    SupersededError,
)
from ckpt.metrics.events import Note, ignore
from ckpt.metrics.noting import HOME
from ckpt.storage import durable
from ckpt.storage.log_file import stamp_of
from ckpt.tiers import drain_notes
from ckpt.tiers.drain_process import DrainProcess

logger = logging.getLogger("ckpt")

_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.05, 1.0
_SHORTEST_RESTART_S, _LONGEST_RESTART_S = 1.0, 60.0
_STANDSTILL_S = 60.0  # after that a word is said; again at each doubling
_GRACE_S = 10.0  # for another process of the node to write the manifest
_STABLE_NS = 50_000_000  # a file that was just replaced may be once more without another time
_UNNOTED_S = 30.0  # no drain takes so long to see what is new: the node does not take what it notes
_LOOK_AT_HOME_S = 5.0  # after so long without a word in its journal, which the node may not take
_JOIN_S = 5.0

Done = Callable[[Any], None]
Fail = Callable[[CheckpointError], None]


class Carried(Protocol):
    """From where to where checkpoints are carried. NodeStorage is one.

    Attributes:
        root: in which the drain keeps its journals.
        home: where they go to.
    """

    @property
    def root(self) -> Path: ...

    @property
    def home(self) -> Any: ...

    def step_directory(self, name: str) -> Path:
        """Where a checkpoint lies until then."""


@dataclasses.dataclass
class Awaited:
    """
    Attributes:
        inbox: see Journal.
        name, called: of its directory on the node, and at home.
        stamp: of the journal when it was read last; None: it is to be read again.
        attempts: that had failed by then; told_attempts: that metrics have counted.
        note: gets the event of its end.
        looked_at: when something new was found, or home was asked.
    """

    sequence: int
    step: int
    name: str
    done: Done
    fail: Fail
    called: str
    inbox: str = ""
    stamp: tuple[int, ...] | None = None
    attempts: int = 0
    told_attempts: int = 0
    note: Note = ignore
    since: float = dataclasses.field(default_factory=time.monotonic)
    looked_at: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def is_bundle(self) -> bool:
        return self.called != self.name

    def tell_arrival(self, place: Any) -> None:
        try:
            self.done(place)
        except Exception:
            logger.exception("telling that step %d has arrived failed", self.step)

    def tell_failure(self, error: CheckpointError) -> None:
        try:
            self.fail(error)
        except Exception:
            logger.exception("telling that step %d has not arrived failed", self.step)


class HomeWatch:
    """Of one Checkpointer. Its thread runs as long as something is awaited.

    Args:
        drain: started again if it has ended; None: somebody else of this node does that.
        longest_look_s: after which the journals are looked at again, whatever was there before.
    """

    here = "on the node"  # where a checkpoint lies until then
    tier = HOME  # to which it goes

    def __init__(self, storage: Carried, drain: DrainProcess | None, longest_look_s: float = _LONGEST_LOOK_S) -> None:
        self._storage = storage
        self._longest_look_s = longest_look_s
        self._drain = drain
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._awaited: dict[int, Awaited] = {}  # by sequence; guarded by _changed, as are the next four
        self._thread: threading.Thread | None = None
        self._look_now = False
        self._telling = 0  # how many are just being told
        self._closed = False
        # Of the thread.
        self._warnings = _Warnings(storage, drain, self.here)
        self._restart_pause_s = _SHORTEST_RESTART_S
        self._restart_at = 0.0

    @property
    def awaits_any(self) -> bool:
        """Whether something is on its way home. Cheap."""
        return bool(self._awaited)

    def watch(self, sequence: int, step: int, name: str, done: Done, fail: Fail, called: str = "", note: Note = ignore) -> None:
        """Either is called once, from a thread of the watch.

        Args:
            sequence: of a commit that stands on the node.
            name: of its step directory.
            called: what that is called at home; empty: the same.
            done: gets the directory at home once it is a checkpoint there.
            fail: gets a SupersededError if it will not be one, because of a newer one; another CheckpointError if a person must
                do something about it.
            note: gets the event of its end.

        Raises:
            ForkedError: the watch belongs to the parent process.
            ClosedError: it was closed.
        """
        if os.getpid() != self._pid:
            raise ForkedError(f"the watch over '{self._storage.root}' belongs to the parent process, which has its thread")
        with self._changed:
            if self._closed:
                raise ClosedError(f"step {step} lies on the node, but nobody waits for it to come home any more")
            self._awaited[sequence] = Awaited(sequence, step, name, done, fail, called or name, note=note)
            self._look_now = True
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="ckpt-home-watch", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # too many threads, or the interpreter is shutting down
                    del self._awaited[sequence]
                    text = f"step {step} lies on the node, but nobody can wait for it to come home: {error}"
                    raise ClosedError(text) from error
                self._thread = thread
            self._changed.notify_all()

    def look_now(self) -> None:
        """Whoever waits is not to wait for the next look."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._look_now = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Until all that is awaited now has an end; False if that has not come in time."""
        if os.getpid() != self._pid:
            return True
        with self._changed:
            self._look_now = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._awaited and not self._telling, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Waits so long for what is awaited; what is left then fails, although the drain goes on. Safe to call again, and in a
        forked child, which has nothing to close.
        """
        if os.getpid() != self._pid:
            return
        self.wait(timeout_s)
        with self._changed:
            self._closed = True
            left, self._awaited = [*self._awaited.values()], {}
            thread = self._thread
            self._changed.notify_all()
        until = f"within {timeout_s:g} s" if timeout_s else "by the time that what has saved it was closed"
        for each in left:
            where = self._storage.step_directory(each.name)
            each.tell_failure(
                DeadlineError(
                    f"step {each.step} is a checkpoint {self.here}, in '{where}', but has not come to '{self._storage.home}' "
                    f"{until}; the drain carries it there as soon as it can"
                )
            )
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)  # it may hang where the disk does

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = _SHORTEST_LOOK_S
        self._warnings.note_round(changed=True)
        while True:
            with self._changed:
                if not self._look_now:
                    self._changed.wait(pause_s)
                if self._look_now:
                    self._look_now, pause_s = False, _SHORTEST_LOOK_S
                if not self._awaited:
                    self._thread = None
                    return
                awaited = [*self._awaited.values()]
            try:
                changed = self._look(awaited)
                self._look_after_drain(changed)
                self._warnings.note_round(changed)
            except Exception:
                logger.exception("looking what has become of checkpoints on '%s' failed; it is tried again", self._storage.root)
                changed = False
            pause_s = _SHORTEST_LOOK_S if changed else min(self._longest_look_s, pause_s * 1.5)

    def _look(self, awaited: Iterable[Awaited]) -> bool:
        """Whether a journal has changed."""
        changed = False
        for each in awaited:
            path = journals.path_of(self._storage.root, each.sequence)
            stamp = stamp_of(path)
            if stamp is None:
                with contextlib.suppress(CheckpointError):  # a directory cannot be read now
                    self._look_whether_it_can_come(each)
            elif stamp != each.stamp:
                journal = journals.read(path)
                if journal is not None:
                    each.looked_at = time.monotonic()
                    changed, each.stamp = True, stamp if time.time_ns() - stamp[1] > _STABLE_NS else None
                    self._note(each, journal)
            if time.monotonic() - each.looked_at > _LOOK_AT_HOME_S:
                self._look_at_home(each)
        return changed

    def _note(self, each: Awaited, journal: Journal) -> None:
        each.inbox = journal.inbox
        if self._drain is not None:
            each.told_attempts = drain_notes.tell(journal, each.told_attempts, self.tier, self._storage.root, each.note)
        if journal.state == COMMITTED:
            self._warnings.note_success()
            self._end(each)
        elif journal.state == SUPERSEDED:
            self._end(each, self.superseded(each, journal.by))
        elif journal.state == FAILED:
            if journal.next is None:
                self._end(each, self.failed(each, journal))  # who made the save says so
                return
            self._warnings.note_failures(journal, journal.attempts - each.attempts)
            each.attempts = journal.attempts

    def _look_at_home(self, each: Awaited) -> None:
        """The drain may have brought it there, and be unable to say so: the disk of the node is full, or has failed."""
        each.looked_at = time.monotonic()
        if each.sequence not in self._awaited:
            return
        if self.is_there(each):
            with contextlib.suppress(StorageError):  # the drain may be about to do that; then it is asked again
                for directory in (self._storage.home / each.called, self._storage.home):
                    durable.sync_directory(directory)
                self._end(each)
        elif (journal := self.read_end(each)) is not None:
            self._note(each, journal)

    def _look_whether_it_can_come(self, each: Awaited) -> None:
        """The drain has not noted it yet, or has forgotten it long since, because this thread was stopped for long."""
        there = manifests.read_if_any(self._storage.step_directory(each.name))
        found = -1 if there is None else there.sequence
        waited_s = time.monotonic() - each.since
        if found == each.sequence:
            if waited_s > _UNNOTED_S and self.is_outdone(each):
                self._end(each, self.superseded(each, -1))
            return
        if found < each.sequence and waited_s < _GRACE_S:
            return
        if stamp_of(journals.path_of(self._storage.root, each.sequence)) is not None:
            return  # by now
        if self.is_there(each):
            self._end(each)
        elif found > each.sequence or self.is_outdone(each) or self._lies_newer(each):
            self._end(each, self.superseded(each, -1))
        elif self.can_be_told(each):
            self._end(each, self.lost(each))

    def _lies_newer(self, each: Awaited) -> bool:
        """Whether what lay beside it shows that it had to go; a bundle gives way to one of the same name only."""
        found = find_steps(self._storage.step_directory(each.name).parent).checkpoints
        newer = [manifest for _, manifest in found if manifest.sequence > each.sequence]
        return any(not manifest.bundle or manifest.bundle == each.called for manifest in newer)

    def _end(self, each: Awaited, error: CheckpointError | None = None) -> None:
        with self._changed:
            if self._awaited.pop(each.sequence, None) is None:
                return  # close() was quicker
            self._telling += 1
        try:
            if error is None:
                each.tell_arrival(self.place_of(each))
            else:
                each.tell_failure(error)
        finally:
            with self._changed:
                self._telling -= 1
                self._changed.notify_all()

    def place_of(self, each: Awaited) -> Any:
        """Where it has arrived."""
        return self._storage.home / each.called

    def is_there(self, each: Awaited) -> bool:
        """Whether it has arrived, although no journal says so any more."""
        if each.is_bundle:
            here = manifests.read_if_any(self._storage.step_directory(each.name))  # home does not say whether it moves `latest`
            moves_latest = here is not None and here.moves_latest
            return has_settled(self._storage.home, each.called, each.sequence, moves_latest=moves_latest)
        return manifests.is_at(self._storage.home / each.called, each.sequence)

    def is_outdone(self, each: Awaited) -> bool:
        """Whether something newer is there; asked where no journal says anything."""
        there = manifests.read_if_any(self._storage.home / each.called)
        if each.is_bundle:
            return there is not None and there.sequence > each.sequence
        return not self.is_there(each) and newest_after(self._storage.home, each.sequence) is not None

    def read_end(self, each: Awaited) -> Journal | None:
        """What the drain has told elsewhere, because the journals are written no more."""
        return stranded.read_end(self._storage.home / FOLDER / self._storage.root.name, each.sequence)

    def can_be_told(self, each: Awaited) -> bool:
        """Whether what has not arrived is not just arriving, nor may be where nobody can look now.

        Raises:
            CheckpointError: that cannot be found out now.
        """
        home: Path = self._storage.home
        return find_run(home) is not None and not manifests.is_at(home / each.called, each.sequence)

    # ---- what is said ----------------------------------------------------------------------------------------------

    def superseded(self, each: Awaited, by: int) -> SupersededError:
        lost = f"step {each.step} did not come to '{self._storage.home}'"
        there = manifests.read_if_any(self._storage.step_directory(each.name))
        if there is not None and there.sequence > each.sequence:
            return SupersededError(f"{lost}: it was saved again meanwhile", each.step, each.step)
        newer = journals.read(journals.path_of(self._storage.root, by)) if by > 0 else None
        if newer is None:
            return SupersededError(f"{lost}: a newer checkpoint has taken its place", each.step)
        where = "is there already" if newer.state == COMMITTED else "goes first"
        text = f"{lost}: the newer step {newer.step} {where}. Save less often if each checkpoint is wanted there"
        return SupersededError(text, each.step, newer.step)

    def lost(self, each: Awaited) -> StorageError:
        where = self._storage.step_directory(each.name)
        text = (
            f"step {each.step} did not come to '{self._storage.home}', and its files are not {self.here} any more: '{where}' "
            "was removed, or cannot be read. Nothing newer has taken its place"
        )
        return StorageError(errno.ENOENT, text, str(where))

    def failed(self, each: Awaited, journal: Journal) -> CheckpointError:
        if not self._storage.step_directory(each.name).is_dir():
            return self.lost(each)
        text = (
            f"step {each.step} was not carried to '{self._storage.home}', but is a checkpoint on the nodes: {journal.text}. "
            f"{remedy(journal.errno)}"
        )
        if journal.errno:
            return StorageError(journal.errno, text, str(self._storage.home / each.called))
        damaged = any(name.endswith(DAMAGED) for name in _names_in(self._storage.step_directory(each.name)))
        return CorruptError(text) if damaged else CheckpointError(text)

    # ---- the drain -------------------------------------------------------------------------------------------------

    def _look_after_drain(self, changed: bool) -> None:
        if self._drain is None:
            return
        now = time.monotonic()
        if changed:
            self._restart_pause_s = _SHORTEST_RESTART_S
        if now < self._restart_at:
            return
        if self._drain.runs():
            self._restart_at = now + _SHORTEST_RESTART_S
            return
        self._drain.ensure()
        self._restart_at = now + self._restart_pause_s
        self._restart_pause_s = min(_LONGEST_RESTART_S, 2 * self._restart_pause_s)


class _Warnings:
    """One word for each doubling, of failures in a row as of the time in which nothing moves."""

    def __init__(self, storage: Carried, drain: DrainProcess | None, here: str) -> None:
        self._storage = storage
        self._here = here
        self._drain = drain or DrainProcess(storage.root)
        self._failures, self._next_word = 0, 1
        self._moved_at, self._standstill_s = time.monotonic(), _STANDSTILL_S

    def note_success(self) -> None:
        self._failures, self._next_word = 0, 1

    def note_failures(self, journal: Journal, count: int) -> None:
        self._failures += count
        if self._failures < self._next_word:
            return
        self._next_word = 2 * self._failures
        code = errno.errorcode.get(journal.errno, str(journal.errno))
        logger.warning(
            "carrying step %d from '%s' to '%s' failed, and is tried again (failures in a row: %d): %s (%s). %s. The training "
            "and the checkpoints %s are not concerned",
            *(journal.step, self._storage.root, self._storage.home, self._failures, journal.text, code, remedy(journal.errno)),
            self._here,
        )

    def note_round(self, changed: bool) -> None:
        """What keeps the drain from so much as beginning stands in no journal."""
        now = time.monotonic()
        if changed:
            self._moved_at, self._standstill_s = now, _STANDSTILL_S
        elif now - self._moved_at >= self._standstill_s:
            self._standstill_s = 2 * (now - self._moved_at)
            logger.warning(
                "checkpoints on '%s' wait to be carried to '%s', and nothing moves for %.0f s. The drain said last (%s): %s",
                *(self._storage.root, self._storage.home, now - self._moved_at, self._drain.log),
                self._drain.last_words() or "nothing",
            )


def remedy(code: int) -> str:
    """What a person may do about an error of a file system at home."""
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Let the job write there, then save again or start the drain anew"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "Make room there"
    if code in (errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN):
        return "Look whether its file system is mounted and answers"
    if code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "Move away what is in the way there"
    return "Look into drain.log there"


def _names_in(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
