"""The thread that takes saves to their end, in order: waits for capture, lets go of the tensors, waits for the data, publishes.

Each Checkpointer has its own, because publishing waits for other ranks: what one job's slow rank holds up must not hold up
another's saves, or those of this process alone. The engine below may be shared.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ckpt import _native
from ckpt.errors import ClosedError, DeadlineError, SkippedError
from ckpt.fence import unwatch
from ckpt.options import Options
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.notices import note_buffered, note_devices, note_fences, note_pageable
from ckpt.saving.task import SaveTask

logger = logging.getLogger("ckpt")

_SLICE_S = 0.2  # how often a waiting background thread looks whether it is to stop
_HANG_S = 3.0  # once given up: for a writer to come back from the system call it is in
_JOIN_S = 30.0  # for the finisher to come back from the publication it is in
# Gets the error that has ended the save, if any; returns the path that it published, or raises. Called for failed saves too,
# because other ranks may be waiting for word from this one.
Publish = Callable[[BaseException | None], Path]


class SaveFinisher:
    """Ends with close(), or with retire() when its owner is gone.

    Args:
        interrupt: ends the waits for other ranks that a publication may be in; called when the deadline of a drain is over.
        farewell: called when the interpreter ends and all is drained; what was said to the other ranks must still reach them.

    Raises:
        ClosedError: the interpreter is shutting down.
    """

    def __init__(self, interrupt: Callable[[], None] | None = None, farewell: Callable[[], None] | None = None) -> None:
        self._interrupt = interrupt
        self.farewell = farewell
        self._changed = threading.Condition()
        self._in_flight = 0  # guarded by _changed: the places that are taken
        self._ending = 0  # guarded by _changed: those of saves that have their outcome, and clear up
        self._owed = 0  # guarded by _changed: what has been handed over, and has no outcome yet
        self._stopping = False  # guarded by _changed
        self._given_up_at: float | None = None  # the drain's deadline has passed: nothing is waited for any more
        self._queue: queue.SimpleQueue[tuple[SaveTask, Publish, bool] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-committer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            if "shutdown" not in str(error):
                raise
            # Since Python 3.12, no thread starts once the interpreter ends, which is before the calls of atexit.
            raise ClosedError("the interpreter is shutting down: saves cannot be begun any more") from error

    # ---- saving ----------------------------------------------------------------------------------------------------

    def admit(self, task: SaveTask, options: Options) -> None:
        """Takes one of the places in flight for this save; waits for one or refuses, as the options say.

        Raises:
            SkippedError, DeadlineError: there was none.
            ClosedError: this is closed.
        """
        with self._changed:
            busy = self._in_flight - self._ending
            if busy >= options.max_in_flight and options.when_busy == "skip":
                raise SkippedError(f"the save to '{task.path}' was skipped: {busy} earlier ones are still in flight")
            own = self._ending if self.is_current_thread else 0  # what it would clear up itself, after this call
            free = self._changed.wait_for(
                lambda: self._in_flight - own < options.max_in_flight or self._stopping, options.timeout_s
            )
            if self._stopping:
                raise ClosedError("the interpreter or the checkpoint engine is shutting down; no more saves are taken")
            if not free:
                raise DeadlineError(
                    f"no earlier save ended within {options.timeout_s} s, so the one to '{task.path}' was not "
                    "begun; the storage is too slow or hangs"
                )
            self._in_flight += 1

    def release(self) -> None:
        """Gives the place back."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def commit_later(self, task: SaveTask, publish: Publish) -> None:
        """Takes over an admitted and submitted save, and releases its place in the end."""
        task.handed_over = True
        self._take(task, publish, admitted=True)

    def attend(self, task: SaveTask, publish: Publish) -> None:
        """The same for a save that was never admitted, so that the other ranks hear of it in its turn."""
        self._take(task, publish, admitted=False)

    def _take(self, task: SaveTask, publish: Publish, admitted: bool) -> None:
        with self._changed:
            self._owed += 1
        self._queue.put((task, publish, admitted))

    # ---- committing ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._commit_all()
        finally:
            self._ended.set()

    def _commit_all(self) -> None:
        while (item := self._queue.get()) is not None:
            task, publish, admitted = item
            published, error = None, None
            try:
                published = publish(self._finish(task))
            except BaseException as caught:  # whatever it is must reach result(), never die with this thread
                error = caught.with_traceback(None)  # whose frames would keep the state alive
                task.discard()
            task.let_go()
            with self._changed:  # first, so that whoever waits for the outcome finds the place free, or as good as that
                self._owed -= 1
                self._ending += admitted
                self._changed.notify_all()
            try:
                if published is not None:
                    task.arrive(published)
            except BaseException as caught:  # what is to carry it on refuses: this thread has other saves to end
                error = caught.with_traceback(None)
            if error is not None:
                task.fail(error)
            task.clear_up()
            with self._changed:  # not before: the next save may need the space
                self._ending -= admitted
                self._in_flight -= admitted
                self._changed.notify_all()
            del item, task, publish, published, error  # else the last save would live until the next

    def _finish(self, task: SaveTask) -> BaseException | None:
        """Waits until all files are written and durable under their temporary names; what went wrong, if anything."""
        try:
            for file in task.files:
                self._await(file, file.job.wait_captured)
            for file in task.files:
                if file.devices:
                    self._await(file, file.job.wait_released)
                    file.try_seal()
                    file.free()
            task.note_captured()
            # Those that no fence has sealed. Not sooner: as long as nobody has been told that the tensors may change, a write
            # to them breaks the promise, and shows here even if it had just begun when the last byte was captured.
            for file in task.files:
                self._await(file, file.job.wait_finished)
                file.try_seal()
                file.compare_sums()
        except DeadlineError as given_up:
            for file in task.files:
                _native.leak(file.memory)  # a writer may still read it
                unwatch(file)  # nothing of it will be published: its tensors may change
            return given_up
        errors = [error for file in task.files if (error := file.error()) is not None]
        for file in task.files:
            file.let_go()
            note_buffered(file)
            note_pageable(file)
        note_devices(task)
        note_fences(task)
        if errors and self._given_up_at is not None:
            return DeadlineError(f"the save to '{task.path}' was given up: it was not durable at the deadline of the drain")
        return task.begin_error or (errors[0] if errors else None)

    def _await(self, file: FileInFlight, done: Callable[[float], bool]) -> None:
        while not done(_SLICE_S):
            if self._given_up_at is None:
                continue
            file.job.fail("given up at the deadline of the drain")
            if time.monotonic() > self._given_up_at + _HANG_S:
                raise DeadlineError(f"the save to '{file.target}' was given up: its storage does not answer")

    # ---- the end ---------------------------------------------------------------------------------------------------

    @property
    def is_current_thread(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    @property
    def owed(self) -> int:
        """How many saves it was given that have no outcome yet. Takes no lock."""
        return self._owed

    def wait_idle(self, timeout_s: float) -> bool:
        """Until all that was handed over has its outcome; what was only admitted may never come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._owed == 0, timeout_s)

    def stop_admitting(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """What is in flight fails, and so does what waits for other ranks. Nothing happens if there is neither."""
        if self._given_up_at is None and not self.wait_idle(0.0):
            self._given_up_at = time.monotonic()
            if self._interrupt is not None:
                self._interrupt()

    def close(self, timeout_s: float) -> None:
        """Drains; then fails what the deadline leaves; then ends the thread. Safe to call again."""
        self.stop_admitting()
        try:
            if not self.wait_idle(timeout_s):
                logger.error("saves in flight are given up: they did not become durable within %s s", timeout_s)
                self.give_up()
        except BaseException:  # Ctrl-C
            self.give_up()
            raise
        finally:
            self.end()

    def end(self) -> None:
        """Ends the thread once it has seen to what it was given. Ctrl-C does not keep it from that."""
        deadline = time.monotonic() + _JOIN_S
        while not self._ended.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(KeyboardInterrupt):
                self._queue.put(None)  # once more does no harm
                self._ended.wait(_SLICE_S)
        with contextlib.suppress(KeyboardInterrupt):
            if self._ended.is_set():  # not before: a join() that Ctrl-C interrupts takes the thread for ended (bpo-45274)
                self._thread.join(_SLICE_S)

    def retire(self) -> None:
        """The same, without waiting for it."""
        self.stop_admitting()
        self._queue.put(None)
