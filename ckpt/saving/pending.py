"""A save on its way: what save() returns."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ckpt.errors import DeadlineError, ForkedError
from ckpt.metrics.stats import SaveStats
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.task import SaveTask

_LOOK_S = 0.01  # how often who waits looks by himself


_SUMS = (
    "bytes_total",
    "bytes_from_tensors",
    "bytes_copied_in_save",
    "bytes_copied_at_fence",
    "bytes_from_devices",
    "device_cached_bytes",
    "probed_bytes",
    "reused_bytes",
    "unread_bytes",
    "arena_wait_s",
    "fence_s",
    "witness_s",
)


def lowest_mode(files: Iterable[FileInFlight]) -> tuple[str | None, str]:
    """Of the files of a save: how bytes left devices, and why not lazily."""
    found = [(file.device_mode, file.device_mode_reason) for file in files if file.device_mode is not None]
    return min(found, key=lambda each: ("host", "ordered", "lazy").index(each[0]), default=(None, ""))


class PendingSave:
    """The future of a save, like `concurrent.futures.Future`. All methods may be called from any thread.

    Two promises come true one after the other: *captured* (the tensors may change) and *durable* (the checkpoint survives a
    power cut and is the one that a restore finds).
    """

    def __init__(self, task: SaveTask) -> None:
        self._task = task
        self.path = task.path
        self.step = task.step

    def done(self) -> bool:
        """True once durable, or failed."""
        return self._task.future.done()

    @property
    def captured(self) -> bool:
        """True once the tensors may change: all bytes have been copied or written, or the save has failed."""
        if self._task.future.done():
            return True
        self._check_owner()
        return self._task.captured()

    def result(self, timeout: float | None = None) -> Path:
        """Waits until durable (fsynced, renamed, directory fsynced) and returns the path that was published.

        Where the directory of a file, or a bundle, was renamed while the save was in flight, that is its path now.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            DeadlineError: not done within `timeout`; the save goes on.
            CheckpointError: what went wrong; nothing was published.
        """
        self._check_owner()
        try:
            return self._task.future.result(timeout)
        except (concurrent.futures.TimeoutError, TimeoutError) as error:
            if self._task.future.done():
                raise
            raise self._not_done(timeout) from error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like result(), but returns the error, or None once durable.

        Raises:
            DeadlineError: not done within `timeout`.
        """
        return self._wait(self._task.future, timeout)

    def add_done_callback(self, callback: Callable[[PendingSave], object]) -> None:
        """Calls `callback(self)` once done, on a background thread; at once if done already. Its errors are logged."""
        self._task.future.add_done_callback(lambda _: callback(self))

    def wait_captured(self, timeout: float | None = None) -> bool:
        """Waits until the tensors may change; False if `timeout`, in seconds, came first. A fence waits for less: it copies."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        reached = threading.Event()
        self.add_captured_callback(lambda _: reached.set())
        while not reached.wait(max(0.0, min(_LOOK_S, end - time.monotonic()))):
            self._task.note_captured()  # who takes saves to their end may be busy with one before
            if time.monotonic() >= end:
                return reached.is_set()
        return True

    def add_captured_callback(self, callback: Callable[[PendingSave], object]) -> None:
        """Calls `callback(self)` once the tensors may change, on a background thread; at once if they may already."""
        self._check_owner()
        self._task.call_when_captured(lambda: callback(self))

    def on_tier(self, name: str) -> TierSave:
        """The same save on a tier that it comes to on its way, "node", or behind that, "object" (`Tier`).

        Raises:
            ValueError: it does not come to one of this name.
        """
        tiers: dict[str, concurrent.futures.Future[Any]] = {**self._task.tiers, **self._task.later}
        if name not in tiers:
            there = ", ".join(map(repr, tiers)) or "no tier"
            raise ValueError(f"the save to '{self.path}' comes to {there}, not to {name!r}: see tiers= of Checkpointer")
        return TierSave(self, tiers[name], name)

    @property
    def stats(self) -> SaveStats:
        """What this save has cost so far."""
        task = self._task
        tiers = dict(task.tier_at)
        stats = SaveStats(save_s=task.save_s, tier_at=tiers, started_at=task.started_at)
        stats = dataclasses.replace(stats, named_at=task.named_at, durable_at=task.durable_at)
        if not task.files or os.getpid() != task.owner:
            return stats
        native = [dict(file.job.stats) for file in task.files]
        found: dict[str, Any] = {name: sum(each[name] for each in native) for name in _SUMS}
        linked = sum(file.apart.linked_bytes for file in task.files if file.apart is not None)
        found["bytes_total"] += linked
        found["reused_bytes"] += linked
        from_devices = [each for each in native if each["bytes_from_devices"]]
        found["arena_pinned"] = bool(from_devices) and all(each["arena_pinned"] for each in from_devices)
        found["arena_bytes"] = max(each["arena_bytes"] for each in native)
        found["device_mode"], found["device_mode_reason"] = lowest_mode(task.files)
        for name in ("captured_at", "written_at", "flushed_at"):
            instants = [each[name] for each in native]
            found[name] = max(instants) if all(instants) else None
        if all(file.job.finished for file in task.files):
            found["direct_io"] = all(each["direct_io"] for each in native)
        return dataclasses.replace(stats, **found)

    def _wait(self, future: concurrent.futures.Future[Any], timeout: float | None) -> BaseException | None:
        if not future.done():
            self._check_owner(future)
        try:
            return future.exception(timeout)
        except (concurrent.futures.TimeoutError, TimeoutError) as error:
            raise self._not_done(timeout) from error

    def __repr__(self) -> str:
        if not self.done():
            state = "of the parent process" if os.getpid() != self._task.owner else "captured" if self.captured else "in flight"
        elif self._task.future.cancelled() or self._task.future.exception():
            state = f"failed: {self._task.future.exception()}"
        else:
            state = "durable"
        return f"<PendingSave {str(self.path)!r} {state}>"

    def _check_owner(self, awaited: concurrent.futures.Future[Any] | None = None) -> None:
        if os.getpid() != self._task.owner and not (awaited or self._task.future).done():
            raise ForkedError(f"the save to '{self.path}' belongs to the parent process; wait for it there")

    def _not_done(self, timeout: float | None) -> DeadlineError:
        state = "captured, not yet durable" if self.captured else "not yet captured"
        if self.done():
            state = f"at home, not yet carried to {' and '.join(self._task.later)}"
        elif self._task.tier_at:
            state = f"committed on the {' and the '.join(self._task.tier_at)}, not yet at home"
        return DeadlineError(f"the save to '{self.path}' is {state} after {timeout} s; it goes on in the background")


class TierSave:
    """The future of a save on a tier: it is over when the checkpoint is committed there.

    On the disks of nodes that survives the death of all processes, and of the operating systems; not that of a disk. A save
    that went past the tier (it was full, or has failed) is over when it is committed where it went. In an object store it
    survives the loss of home, too.
    """

    def __init__(self, pending: PendingSave, future: concurrent.futures.Future[Any], name: str) -> None:
        self._pending = pending
        self._future = future
        self.name = name

    def done(self) -> bool:
        """True once committed there, or failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Path | str:
        """Waits until it is committed there; returns the directory, or in an object store its URL.

        Raises:
            DeadlineError, CheckpointError: as of PendingSave.result().
            SupersededError: on "object": the tier does not want this one (`every`), or a newer one has taken its place.
        """
        if (error := self.exception(timeout)) is not None:
            raise error
        found: Path | str = self._future.result()
        return found

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like result(), but returns the error, or None once committed there.

        Raises:
            DeadlineError: not done within `timeout`.
        """
        return self._pending._wait(self._future, timeout)
