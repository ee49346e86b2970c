"""A directory of checkpoints: one sub-directory a step, committed, kept, restored.

directory/
    latest                    the name of the newest committed step directory; written last
    step-000000000042/
        manifest.json         the commit record: sizes and CRC-32s of the files
        state.pt              a torch file
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ckpt import _commit, _manifest, _runtime, _storage
from ckpt._file_save import FileSave
from ckpt._load import checksum_threads, torch_load
from ckpt._native import digest_file
from ckpt._save import log_failure, start
from ckpt.errors import (
    CheckpointError,
    ClosedError,
    CorruptError,
    DeadlineError,
    FailedSavesError,
    ForkedError,
    NotACheckpointError,
    SkippedError,
    StorageError,
)
from ckpt.options import Options
from ckpt.pending import PendingSave, wait_all

logger = logging.getLogger("ckpt")


class Restored(NamedTuple):
    """What restore() found: the step, and the state as it was given to save()."""

    step: int
    state: Any


class Checkpointer:
    """Saves a training job's state step by step, and finds the newest good one again.

    Args:
        directory: where the step directories go; made if missing. One Checkpointer at a time may write to it.
        keep: how many committed steps to keep, newest first; None keeps all. The newest good one always stays.
        options: see Options.

    Raises:
        StorageError: the directory cannot be made.
        ValueError: keep is less than 1.

    A context manager: leaving the block drains what is in flight. Methods may be called from any one thread at a time.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = 3, options: Options | None = None) -> None:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"keep must be at least 1, or None to keep all, but is {keep!r}")
        self.directory = Path(os.path.abspath(os.fspath(directory)))
        self.options = options or Options()
        _storage.make_directory(self.directory, durable=True)
        self._committer = _commit.StepCommitter(self.directory, keep)
        self._runtime = _runtime.lease(self.options)
        self._owner = os.getpid()
        self._closed = False
        self._pending: list[PendingSave] = []
        self._unreported: BaseException | None = None  # of the newest save that failed since the last wait()
        self._failed_in_a_row = 0
        self._last_failed: BaseException | None = None

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, *, lazy: Any = None) -> PendingSave:
        """Saves `state` as checkpoint `step`, in the background. Saving a step again replaces it once the new one is durable.

        Args:
            step: not negative; need not grow. The newest checkpoint is the one committed last.
            state, lazy: as in `ckpt.save`.

        Raises:
            FailedSavesError: `Options.max_failed_saves` saves in a row have failed, this one was not begun.
            ClosedError: after close().
            TypeError, ValueError: step is not a count; also what pickling `state` raises.

        Failures of the storage are not raised here: they are logged, counted, and raised by the result's `result()` and by
        wait().
        """
        self._check_usable()
        name = _commit.step_name(step)
        self._check_failures()
        pending = PendingSave(self.directory / name, step, on_done=self._note_done)
        try:
            self._begin(pending, name, step, state, lazy)
        except (StorageError, DeadlineError) as error:
            pending._fail(error.with_traceback(None))  # whose frames would keep the state alive
        self._pending = [*(earlier for earlier in self._pending if not earlier.done()), pending]
        return pending

    def _begin(self, pending: PendingSave, name: str, step: int, state: Any, lazy: Any) -> None:
        target = self._committer.begin(name)
        pending.add_done_callback(lambda _: self._committer.abandon(target))

        file = FileSave(target)

        def publish(error: BaseException | None) -> Path:
            if error is not None:
                raise error
            return self._committer.publish(step, file.temporary, target, file.job)

        try:
            start(self._runtime, pending, [(file, state)], publish, lazy=lazy, options=self.options)
        except BaseException:
            self._committer.abandon(target)
            raise

    def _check_failures(self) -> None:
        limit = self.options.max_failed_saves
        if limit and self._failed_in_a_row >= limit:
            cause, self._failed_in_a_row = self._last_failed, 0
            raise FailedSavesError(
                f"the last {limit} saves to '{self.directory}' failed, the newest with: {cause}. Training would go on without "
                "checkpoints; mend the cause, or set Options.max_failed_saves=0 to go on regardless"
            ) from cause

    def _note_done(self, pending: PendingSave, error: BaseException | None) -> None:
        if error is None:
            self._failed_in_a_row = 0
            self._last_failed = None
        elif not isinstance(error, SkippedError):
            self._failed_in_a_row += 1
            self._last_failed = self._unreported = error
            log_failure(pending, error)

    # ---- looking ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The committed steps, ascending. What is in flight or was left by a crash is not among them."""
        return sorted(manifest.step for _, manifest in self._committer.look()[0])

    def restore(self, *, map_location: Any = None, weights_only: bool = True) -> Restored | None:
        """Loads the newest good checkpoint; None if nothing was ever committed.

        Sizes and CRC-32s of all files are verified. A checkpoint that fails is passed over, with a warning in the log, for the
        next older one. Waits for saves of this Checkpointer that are in flight.

        Args:
            map_location, weights_only: as in `torch.load`.

        Raises:
            CorruptError: there are checkpoints, but none is good; the message names each with its cause.
            CheckpointError: the newest good one holds objects that weights_only refuses.
        """
        self._check_usable()
        self._drain(self.options.drain_timeout_s)
        committed, damaged = self._committer.look()
        rejected = [str(error) for error in damaged]
        for error in damaged:
            logger.warning("a damaged checkpoint is passed over: %s", error)
        for directory, manifest in committed:
            try:
                path = self._verify(directory, manifest)
            except (CorruptError, NotACheckpointError, StorageError) as error:
                rejected.append(str(error))
                logger.warning("checkpoint '%s' is passed over: %s", directory, error)
                continue
            return Restored(manifest.step, torch_load(path, map_location, weights_only))
        if rejected:
            raise CorruptError(f"no checkpoint in '{self.directory}' is good: " + "; ".join(rejected))
        return None

    def _verify(self, directory: Path, manifest: _manifest.Manifest) -> Path:
        """Checks every file against the manifest; returns the one that holds the state."""
        for file in manifest.files:
            size, crc = digest_file(os.fsencode(directory / file.name), checksum_threads())
            if size != file.bytes:
                raise CorruptError(f"'{directory / file.name}' has {size} bytes; its manifest says {file.bytes}")
            if crc != file.crc32:
                raise CorruptError(f"'{directory / file.name}' fails the CRC-32 of its manifest: its bytes have changed")
        return directory / manifest.files[0].name

    # ---- waiting ---------------------------------------------------------------------------------------------------

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

    def _drain(self, timeout: float | None) -> None:
        if not wait_all(self._pending, timeout):
            raise DeadlineError(f"saves to '{self.directory}' are still in flight after {timeout} s")
        self._pending = []

    def close(self) -> None:
        """Waits for what is in flight, at most `Options.drain_timeout_s`, and ends. Safe to call twice.

        Raises:
            CheckpointError: the newest save did not become durable.
        """
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        try:
            self._drain(self.options.drain_timeout_s)
        finally:
            _runtime.give_back(self._runtime, 0.0 if self._pending else self.options.drain_timeout_s)
        if self._last_failed is not None:
            raise self._last_failed

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise
            logger.exception("closing the checkpointer of '%s' failed while another error was on its way", self.directory)

    def _check_usable(self) -> None:
        if os.getpid() != self._owner:
            raise ForkedError(f"the Checkpointer of '{self.directory}' belongs to the parent process; make one here")
        if self._closed:
            raise ClosedError(f"the Checkpointer of '{self.directory}' is closed")
