"""The library's own record of a save on its way. PendingSave is the user's view of it."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ckpt.metrics.events import Note, ignore
from ckpt.saving.file_in_flight import FileInFlight

logger = logging.getLogger("ckpt")


class SaveTask:
    """
    Args:
        path: where the save is published.
        on_done: runs before anybody who waits sees the outcome; gets the error, if there is one.

    Attributes:
        owner: the process that carries it out.
        future: the outcome.
        files: those that are submitted.
        planned: these, and those that are not submitted, or not written by this process.
        begin_error: why not all files could be submitted.
        handed_over: the finisher has it.
        skipped: why it was not begun at all, if that is so.
        carry: set by who publishes it on a tier that is not the last: called when that has been done, and sees to the rest.
        tiers: by name, those that it comes to on its way: where it lies there, once it does.
        later: by name, the tiers that it comes to behind its end.
        then: called at its end, if that is good: sees to those tiers.
        tier_at: when it came to any of them.
        counts: whether its failure is one more in a row; not if the next ones will go another way.
        afterwards: runs once whoever waits has the outcome: gives space back.
        started_at, named_at, durable_at: instants of `time.monotonic()`, see SaveStats.
        save_s: seconds the caller has spent inside save().
        sequence, slowest_rank, all_ranks: of its commit, once there is one: see SaveRecord.
        note: gets the events of this save.
    """

    def __init__(
        self, path: Path, step: int | None = None, on_done: Callable[[SaveTask, BaseException | None], None] | None = None
    ) -> None:
        self.path = path
        self.step = step
        self._on_done = on_done
        self.owner = os.getpid()
        self.future: concurrent.futures.Future[Path] = concurrent.futures.Future()
        self.files: tuple[FileInFlight, ...] = ()
        self.planned: tuple[FileInFlight, ...] = ()
        self.begin_error: BaseException | None = None
        self.handed_over = False
        self.skipped: BaseException | None = None
        self.afterwards: Callable[[], object] | None = None
        self.carry: Callable[[], None] | None = None
        self.tiers: dict[str, concurrent.futures.Future[Path]] = {}
        self.later: dict[str, concurrent.futures.Future[str]] = {}
        self.then: Callable[[], None] | None = None
        self.tier_at: dict[str, float] = {}
        self.counts = True
        self.started_at = time.monotonic()
        self.named_at: float | None = None
        self.durable_at: float | None = None
        self.save_s = 0.0
        self.sequence: int | None = None
        self.slowest_rank: int | None = None
        self.all_ranks: Mapping[str, float] = {}
        self.note: Note = ignore
        self._told = threading.Lock()
        self._captured: concurrent.futures.Future[None] | None = None  # guarded by _told; once somebody wants to know
        self.device_bytes = 0  # of the files so far, where they come one by one

    def captured(self) -> bool:
        """See PendingSave.captured."""
        if self.future.done():
            return True
        sealed = [file.try_seal() for file in self.files]  # each of them, whatever the first says
        return self.handed_over and all(sealed)

    def call_when_captured(self, callback: Callable[[], object]) -> None:
        with self._told:
            captured = self._captured = self._captured or concurrent.futures.Future()
        captured.add_done_callback(lambda _: callback())
        self.note_captured()

    def note_captured(self) -> None:
        """Calls those who are to be called, if it is so. If there are none, files are not sealed sooner than they must be."""
        captured = self._captured
        if captured is None or not self.captured():
            return
        with self._told:
            if captured.done() or captured.running():
                return
            captured.set_running_or_notify_cancel()
        captured.set_result(None)

    def done(self) -> bool:
        """True once durable, or failed."""
        return self.future.done()

    def discard(self) -> None:
        """Removes the files, which will not be published."""
        for file in self.planned:
            file.discard()

    def let_go(self) -> None:
        """Of what is needed no more once the files are published or removed."""
        for file in self.files:
            file.forget_structure()
        for file in self.planned:
            file.close_directory()

    def arrive(self, path: Path) -> None:
        """`path` was published; that is the end unless it is to be carried on from there."""
        carry, self.carry = self.carry, None
        if carry is None:
            self.succeed(path)
        else:
            carry()

    def reach(self, tier: str, path: Path) -> None:
        """It is durable on a tier on its way."""
        self.tier_at[tier] = time.monotonic()
        self.tiers[tier].set_result(path)

    def succeed(self, path: Path) -> None:
        """Ends it: `path` was published."""
        self.durable_at = time.monotonic()
        for tier in [name for name, future in self.tiers.items() if not future.done()]:
            self.reach(tier, path)  # it went past it, to where more survives
        on_done, self._on_done = self._on_done, None  # else the two would hold each other
        if on_done is not None:
            on_done(self, None)
        self.future.set_result(path)
        self.note_captured()
        self._go_on()

    def _go_on(self) -> None:
        then, self.then = self.then, None
        try:
            if then is not None:
                then()
        except Exception as error:  # what was published stands
            logger.exception("step %s is published, but nothing sees to it behind that", self.step)
            for future in self.later.values():
                future.set_exception(error)

    def reach_later(self, tier: str, place: str) -> None:
        """It has come to a tier behind its end."""
        self.tier_at[tier] = time.monotonic()
        self.later[tier].set_result(place)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, unless it has its outcome already."""
        if self.future.done():
            return
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            on_done(self, error)
        futures: list[concurrent.futures.Future[Any]] = [*self.tiers.values(), *self.later.values()]
        for future in futures:
            if not future.done():
                future.set_exception(error)
        self.future.set_exception(error)
        self.note_captured()

    def clear_up(self) -> None:
        """What is left to do once whoever waits has the outcome."""
        call, self.afterwards = self.afterwards, None
        try:
            if call is not None:
                call()
        except Exception as error:
            logger.warning("clearing up behind the save to '%s' failed, its outcome stands: %s", self.path, error)


def wait_landed(tasks: Iterable[SaveTask], tier: str, timeout: float | None) -> bool:
    """Waits until all have come to a tier on their way, or failed; False if the timeout (seconds) came first."""
    futures = [task.tiers.get(tier, task.future) for task in tasks]
    return not concurrent.futures.wait(futures, timeout).not_done


def wait_all(tasks: Iterable[SaveTask], timeout: float | None) -> bool:
    """Waits until all are done; False if the timeout (seconds) came first."""
    return not concurrent.futures.wait([task.future for task in tasks], timeout).not_done
