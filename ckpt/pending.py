"""A save on its way: what save() returns."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt._tripwire import Tripwire
from ckpt.errors import CaptureError, DeadlineError, ForkedError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class SaveStats:
    """What a save has cost so far.

    Attributes:
        save_s: seconds the caller spent inside save().
        fence_s: seconds training was held at fences for this save.
        arena_wait_s: of both, seconds spent waiting for room in the arena: back-pressure.
        bytes_total: size of the file, bytes.
        bytes_zero_copy: bytes written straight from tensor memory.
        bytes_copied_in_save: bytes copied to the arena inside save().
        bytes_copied_at_fence: bytes copied to the arena by a fence.
        direct_io: whether the file was written past the page cache; None until it is known.
        started_at, captured_at, flushed_at, durable_at: instants of `time.monotonic()`: save() was called; tensors might
            change; data was fsynced; the checkpoint was published and fsynced. None until reached.
    """

    save_s: float = 0.0
    fence_s: float = 0.0
    arena_wait_s: float = 0.0
    bytes_total: int = 0
    bytes_zero_copy: int = 0
    bytes_copied_in_save: int = 0
    bytes_copied_at_fence: int = 0
    direct_io: bool | None = None
    started_at: float | None = None
    captured_at: float | None = None
    flushed_at: float | None = None
    durable_at: float | None = None


class PendingSave:
    """The future of a save, like `concurrent.futures.Future`. All methods may be called from any thread.

    Two promises come true one after the other: *captured* (the tensors may change) and *durable* (the checkpoint survives a
    power cut and is the one that a restore finds).
    """

    def __init__(
        self, path: Path, step: int | None = None, on_done: Callable[[PendingSave, BaseException | None], None] | None = None
    ) -> None:
        self.path = path
        self.step = step
        self._on_done = on_done  # runs before anybody who waits sees the outcome
        self._future: concurrent.futures.Future[Path] = concurrent.futures.Future()
        self._owner = os.getpid()
        self._lock = threading.Lock()  # guards _held, _sealed
        self._sealed = False
        self._until_captured: Any = None  # keeps the tensors' memory
        self._until_durable: Any = None  # keeps the memory that is ours
        self._tripwire: Tripwire | None = None
        self._record_tensors: Sequence[torch.Tensor | None] | None = None  # names for verify_capture
        self._job: Any = None
        self._on_sealed: Callable[[PendingSave], None] | None = None
        self._wants_direct = False
        self._seal_error: CaptureError | None = None
        self._discard: Callable[[], None] = lambda: None  # removes the file that will not be published
        self._started_at = time.monotonic()
        self._save_s = 0.0
        self._durable_at: float | None = None

    # ---- the public face -------------------------------------------------------------------------------------------

    def done(self) -> bool:
        """True once durable, or failed."""
        return self._future.done()

    @property
    def captured(self) -> bool:
        """True once the tensors may change: all bytes have been copied or written, or the save has failed."""
        if self._sealed or self._future.done():
            return True
        self._check_owner()
        return self._try_seal()

    def result(self, timeout: float | None = None) -> Path:
        """Waits until durable (fsynced, renamed, directory fsynced) and returns the path that was published.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            DeadlineError: not done within `timeout`; the save goes on.
            CheckpointError: what went wrong; nothing was published.
        """
        self._check_owner()
        try:
            return self._future.result(timeout)
        except (concurrent.futures.TimeoutError, TimeoutError) as error:
            if self._future.done():
                raise
            raise self._not_done(timeout) from error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like result(), but returns the error, or None once durable.

        Raises:
            DeadlineError: not done within `timeout`.
        """
        self._check_owner()
        try:
            return self._future.exception(timeout)
        except (concurrent.futures.TimeoutError, TimeoutError) as error:
            raise self._not_done(timeout) from error

    def add_done_callback(self, callback: Callable[[PendingSave], object]) -> None:
        """Calls `callback(self)` once done, on a background thread; at once if done already. Its errors are logged."""
        self._future.add_done_callback(lambda _: callback(self))

    @property
    def stats(self) -> SaveStats:
        """What this save has cost so far."""
        if self._job is None or os.getpid() != self._owner:
            return SaveStats(save_s=self._save_s, started_at=self._started_at)
        native = dict(self._job.stats)
        for name in ("captured_at", "flushed_at"):
            native[name] = native[name] or None
        if not self._job.finished:
            native["direct_io"] = None
        return SaveStats(save_s=self._save_s, started_at=self._started_at, durable_at=self._durable_at, **native)

    def __repr__(self) -> str:
        if not self.done():
            state = "of the parent process" if os.getpid() != self._owner else "captured" if self.captured else "in flight"
        elif self._future.cancelled() or self._future.exception():
            state = f"failed: {self._future.exception()}"
        else:
            state = "durable"
        return f"<PendingSave {str(self.path)!r} {state}>"

    # ---- for the runtime -------------------------------------------------------------------------------------------

    def _hold(
        self,
        tripwire: Tripwire,
        *,
        until_captured: Any,
        until_durable: Any,
        record_tensors: Sequence[torch.Tensor | None] | None,
        on_sealed: Callable[[PendingSave], None],
    ) -> None:
        """Keeps the memory; to be called before the job can read it."""
        self._tripwire, self._record_tensors, self._on_sealed = tripwire, record_tensors, on_sealed
        self._until_captured, self._until_durable = until_captured, until_durable

    def _try_seal(self) -> bool:
        """If the job is captured: looks once whether a tensor was changed before, and lets go of the memory."""
        job = self._job
        if job is None or not job.captured:
            return False
        with self._lock:
            if self._sealed:
                return True
            if job.error is not None:
                # Writes from the memory may still be under way; nothing will be published, so it may change, but not go.
                if not job.finished:
                    return True
            elif self._tripwire is not None and (change := self._tripwire.changed()):
                # Kept here, because the job may have finished its file already; it is not published before this look.
                self._seal_error = CaptureError(
                    f"{change} before its bytes were captured by the save to '{self.path}'; nothing was "
                    "published. Call ckpt.fence() before code that writes to tensors outside an optimizer step"
                )
                job.fail(str(self._seal_error))
            self._until_captured = None
            if self._record_tensors is None:  # else the names are needed to the end
                self._tripwire = None
            self._sealed = True
        if self._on_sealed is not None:
            self._on_sealed(self)
        return True

    def _error(self) -> BaseException | None:
        """The job's error, with the tensor's name where the core only knows a record's number."""
        error = self._seal_error or self._job.error
        if isinstance(error, CaptureError) and error.record >= 0 and self._record_tensors and self._tripwire:
            name = self._tripwire.describe(self._record_tensors[error.record])
            return CaptureError(
                f"{name} changed between save() and the capture of its bytes for '{self.path}' (checksums differ); nothing "
                "was published. Call ckpt.fence() before code that writes to tensors outside an optimizer step"
            )
        return error

    def _succeed(self, path: Path) -> None:
        self._durable_at = time.monotonic()
        self._let_go()
        if self._on_done is not None:
            self._on_done(self, None)
        self._future.set_result(path)

    def _fail(self, error: BaseException) -> None:
        if self._future.done():
            return
        self._let_go()
        if self._on_done is not None:
            self._on_done(self, error)
        self._future.set_exception(error)

    def _let_go(self) -> None:
        self._until_durable = self._record_tensors = self._tripwire = None

    def _check_owner(self) -> None:
        if os.getpid() != self._owner and not self._future.done():
            raise ForkedError(f"the save to '{self.path}' belongs to the parent process; wait for it there")

    def _not_done(self, timeout: float | None) -> DeadlineError:
        state = "captured, not yet durable" if self.captured else "not yet captured"
        return DeadlineError(f"the save to '{self.path}' is {state} after {timeout} s; it goes on in the background")


def wait_all(saves: Iterable[PendingSave], timeout: float | None) -> bool:
    """Waits until all are done; False if the timeout (seconds) came first."""
    return not concurrent.futures.wait([save._future for save in saves], timeout).not_done
