"""What Checkpointer and BundleCheckpointer have in common: who saves, what is in flight, what has failed, and the end."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from ckpt.coordinator import Coordinator
from ckpt.errors import CheckpointError, ClosedError, DeadlineError, FailedSavesError, ForkedError, SkippedError, StorageError
from ckpt.metrics.events import CLOSE_S, EventLog, Note, ignore, is_wanted, save_fields
from ckpt.metrics.noting import HOME, note_commit, note_free, note_save
from ckpt.metrics.record import MetricsSink, SaveRecord, Sinks, outcome_of
from ckpt.metrics.registry import PROCESS
from ckpt.options import Options
from ckpt.saving import runtime
from ckpt.saving.baselines import Baselines
from ckpt.saving.frozen_files import FrozenFiles
from ckpt.saving.pending import PendingSave
from ckpt.saving.submit import log_failure
from ckpt.saving.task import SaveTask, wait_all
from ckpt.storage import free_space

logger = logging.getLogger("ckpt")

_MOST_LOGS = 16  # directories of frameworks that one session keeps events of
_Self = TypeVar("_Self", bound="SaveSession")
# For each coordinator that several sessions use: their numbers. Ranks make them in the same order.
_streams: weakref.WeakKeyDictionary[Coordinator, itertools.count[int]] = weakref.WeakKeyDictionary()


class SaveSession:
    """
    Args:
        coordinator: by what the ranks agree.
        owned: it was made for this session: nobody else uses it, and it ends with it.
        what: names this in messages.
        stream: the beginning of the keys of its conversations.
        lands_on_nodes: saves go on when the directory hangs: nothing that tells of them is to wait for it.
        metrics: who is told of each save.
    """

    def __init__(
        self,
        options: Options,
        coordinator: Coordinator,
        *,
        owned: bool,
        what: str,
        stream: str,
        lands_on_nodes: bool = False,
        metrics: Iterable[MetricsSink] = (),
    ) -> None:
        self.options = options
        self._sinks = Sinks(metrics)
        self._coordinator = coordinator
        self._owns_coordinator = owned
        self._what = what
        self._stream = stream if owned else f"{stream}-{next(_streams.setdefault(coordinator, itertools.count()))}"
        self._runtime = runtime.lease(options)
        # One that is not our own is not interrupted: that would end it for all.
        self._finisher = self._runtime.finisher(*((coordinator.interrupt, coordinator.close) if owned else ()))
        weakref.finalize(self, self._finisher.retire).atexit = False
        self._baselines = Baselines(options)
        self._frozen_files = FrozenFiles(options)
        self._owner = os.getpid()
        self._closed = False
        self._saves = 0  # that were asked for, whatever came of them: all ranks count their calls
        self._pending: list[SaveTask] = []
        self._unreported: BaseException | None = None  # of the newest save that failed since the last wait()
        self._failed_in_a_row = 0
        self._raised_at = 0  # saves before this one were in flight when so many failures were raised
        self._last_failed: BaseException | None = None
        self._failed_number = -1  # which save that was
        self._noting = threading.RLock()  # one outcome at a time; a sink may save
        self._lands_on_nodes = lands_on_nodes
        self._logs: dict[Path, EventLog] = {}  # of directories that are ours
        PROCESS.take_part(coordinator.rank, coordinator.world_size)

    @property
    def rank(self) -> int:
        """This process's number among those that save together, from 0."""
        return self._coordinator.rank

    @property
    def world_size(self) -> int:
        """How many processes save together."""
        return self._coordinator.world_size

    # ---- the end ---------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> None:
        """Waits until every save is durable.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            DeadlineError: not within `timeout`.
            CheckpointError: a save has failed since the last wait(); the newest such error.
        """
        self._check_usable()
        self._drain(timeout)
        error, self._unreported = self._unreported, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for what is in flight, at most `Options.drain_timeout_s`, and ends. Safe to call twice.

        Raises:
            CheckpointError: the newest save did not become durable.
        """
        failed = self._end()
        if failed is not None:
            raise failed

    def _end(self) -> BaseException | None:
        """See close(). Returns what it raises if the newest save did not become durable."""
        if self._closed or os.getpid() != self._owner:
            return None
        self._closed = True
        if self._finisher.is_current_thread:  # the garbage collector has chosen it: it cannot wait for itself
            self._finisher.retire()
            return None
        try:
            self._drain(self.options.drain_timeout_s)
        finally:
            self._finisher.close(0.0)  # what has not come by now is given up
            self._baselines.clear()
            self._frozen_files.clear()
            runtime.give_back(self._runtime, 0.0)
            if self._owns_coordinator:
                self._coordinator.close()
            self._release()
            end = time.monotonic() + CLOSE_S
            for log in self._logs.values():
                log.close(max(0.0, end - time.monotonic()))
            self._sinks.close()
        return self._last_failed

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            failed = self._end()  # not close(): what it raises here would be chained to the error that is on its way
        except CheckpointError as late:
            failed = late
        if failed is not None and not _leads_to(failed, error):
            logger.error("closing %s failed while another error was on its way: %s", self._what, failed)

    # ---- for those who derive from it ------------------------------------------------------------------------------

    def _events_in(self, directory: Path, *, by_default: bool, begins: bool = False) -> Note:
        """Takes what happens in a directory.

        Args:
            by_default: whether rank 0 keeps events there unless the options say otherwise.
            begins: the directory is there, and ours: from now on its file may be written to.
        """
        if not is_wanted(self.options.events, self.rank, by_default=by_default):
            return ignore
        if directory not in self._logs:
            if len(self._logs) >= _MOST_LOGS:
                self._logs.pop(next(iter(self._logs)))
            self._logs[directory] = EventLog(directory, self.rank, behind=self._lands_on_nodes)
        log = self._logs[directory]
        if begins:
            log.begin()
        return log.note

    def _release(self) -> None:
        """Gives directories back."""

    def _remember(self, task: SaveTask) -> None:
        self._pending = [*(earlier for earlier in self._pending if not earlier.done()), task]

    def _drain(self, timeout: float | None) -> None:
        if not wait_all(self._pending, timeout):
            raise DeadlineError(f"saves of {self._what} are still in flight after {timeout} s")
        self._pending = []

    def _check_usable(self) -> None:
        if os.getpid() != self._owner:
            raise ForkedError(f"{self._what} belongs to the parent process; make one here")
        if self._closed:
            raise ClosedError(f"{self._what} is closed")

    def _check_failures(self) -> None:
        """Raises FailedSavesError after too many in a row; then the count begins anew, with the next save."""
        limit = self.options.max_failed_saves
        if limit and self._failed_in_a_row >= limit:
            cause, self._failed_in_a_row, self._raised_at = self._last_failed, 0, self._saves
            raise FailedSavesError(
                f"the last {limit} saves of {self._what} failed, the newest with: {cause}. Training would go on without "
                "checkpoints; mend the cause, or set Options.max_failed_saves=0 to go on regardless"
            ) from cause

    def _note_done(self, number: int, task: SaveTask, error: BaseException | None) -> None:
        """The outcome of save `number`. Of saves that tiers carry on, another thread may tell."""
        try:
            self._keep_for_the_next(number, task, error)
        except Exception:
            logger.exception("what the next save could use of that to '%s' could not be kept", task.path)
        try:
            with self._noting:
                self._count(number, task, error)
                record = self._tell(task, error)
            self._write_down(task, record)
        except Exception:  # who waits for the outcome must get it
            logger.exception("what the save to '%s' has cost could not be noted", task.path)

    def _keep_for_the_next(self, number: int, task: SaveTask, error: BaseException | None) -> None:
        """What it has written, once that is a checkpoint; of a save that is none, or may be none, nothing."""
        if error is None:
            self._baselines.note_committed(number, task.step, task.files)
            frozen = [file.apart for file in task.files if file.apart is not None]
            self._frozen_files.note_committed(number, task.step, frozen)
        elif isinstance(error, StorageError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._frozen_files.give_up()
            self._baselines.give_up()  # who has removed the checkpoint before, for its room, is to get it
        if error is not None:
            self._baselines.note_failed(task.files)
        for file in task.files:
            file.drop_baseline()

    def _tell(self, task: SaveTask, error: BaseException | None) -> SaveRecord:
        """All who keep numbers, just before the outcome is known to those who wait for it."""
        stats, outcome, committed = PendingSave(task).stats, outcome_of(error), error is None
        slowest = task.slowest_rank if self.world_size > 1 else None
        details = (task.step, task.path, outcome, error, stats, task.sequence if committed else None, slowest)
        all_ranks = task.all_ranks if committed and self.world_size > 1 else {}
        record = SaveRecord(self.rank, self.world_size, *details, all_ranks)
        note_save(outcome, stats)
        if committed:
            note_commit(HOME, task.step)
        self._sinks.tell(record)
        return record

    def _write_down(self, task: SaveTask, record: SaveRecord) -> None:
        """What asks a file system, which may hang: so nobody is kept out meanwhile, and save() is not kept in for it."""
        if record.outcome == "committed":
            note_free(HOME, free_space.free_bytes(task.path.parent))
            task.note("commit", tier=HOME, step=task.step, sequence=task.sequence, bytes=record.stats.bytes_total)
        skipped = record.outcome == "skipped"  # inside of save()
        task.note("save", in_passing=skipped, **save_fields(record, self._runtime.arena_used))

    def _count(self, number: int, task: SaveTask, error: BaseException | None) -> None:
        if error is None:
            self._failed_in_a_row = 0
            if number >= self._failed_number:
                self._last_failed = None
        elif not isinstance(error, SkippedError):
            # What has landed on a tier is a checkpoint there: training need not end for that.
            self._failed_in_a_row += number >= self._raised_at and task.counts and not task.tier_at
            self._last_failed, self._failed_number = error, number
            self._unreported = error
            log_failure(task, error)


def _leads_to(cause: BaseException, error: BaseException) -> bool:
    """Whether it is what is on its way, or is told with that as its cause."""
    known: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in known:
        known.append(each)
        each = each.__cause__ or each.__context__
    return any(cause is other for other in known)
