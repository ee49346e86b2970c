"""Every error that this library raises.

    CheckpointError
    ├── StorageError        a storage system call failed (also an OSError: errno, filename)
    ├── CaptureError        a tensor changed before its bytes were captured; nothing was published
    ├── CorruptError        a file, or every checkpoint of a directory, fails its checksums
    ├── MismatchError       a file does not fit what it is to be loaded into; says whether anything was changed
    ├── NotACheckpointError a directory or manifest is not what it should be
    ├── DeadlineError       a wait outran its timeout (also a TimeoutError)
    ├── SkippedError        this save was not made: another was in flight and when_busy is "skip"
    │   └── SupersededError this checkpoint stayed on the disks of the nodes: a newer one took its place on the way home
    ├── FailedSavesError    too many saves in a row have failed
    ├── InUseError          another job writes to the directory
    ├── ClosedError         the Checkpointer, or the engine under it, is closed
    ├── ForkedError         a forked child touched the engine of its parent
    ├── CancelledError      the save was interrupted (Ctrl-C in a wait)
    ├── UnsupportedError    a state cannot be saved in the way that was asked for
    ├── DeviceError         the CUDA driver is missing, or one of its calls failed
    └── PeerError           ranks of the job did not answer in time (which: `ranks`)

Each message says what was being done, on which path or step, the cause, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class CheckpointError(Exception):
    """Base of all errors of this library."""


class StorageError(CheckpointError, OSError):
    """A storage system call failed. `errno` and `filename` are those of OSError.

    Attributes:
        bytes_at: of a read: begin and end of the bytes of the file, some of which cannot be read; None if that is not known.
    """

    bytes_at: tuple[int, int] | None = None

    def __init__(self, errno: int, message: str, filename: str | None = None) -> None:
        OSError.__init__(self, errno, message)
        if filename:
            self.filename = filename
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type, tuple[int | None, str, str | None]]:
        return type(self), (self.errno, self.message, self.filename)


class CaptureError(CheckpointError):
    """A tensor changed between save() and the capture of its bytes."""

    record = -1  # index of the record in its file, where known


class CorruptError(CheckpointError):
    """Bytes on disk are not those that were written.

    Attributes:
        bytes_at: begin and end of the bytes of the file, some of which are wrong; None if that is not known.
    """

    bytes_at: tuple[int, int] | None = None


class MismatchError(CheckpointError):
    """A file and what it was to be loaded into do not fit.

    Attributes:
        problems: what differs: a text for each place.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type, tuple[str, list[str]]]:
        return type(self), (str(self), self.problems)


class NotACheckpointError(CheckpointError):
    """A directory does not hold a committed checkpoint, or its manifest cannot be understood."""


class DeadlineError(CheckpointError, TimeoutError):
    """A wait outran its timeout."""


class SkippedError(CheckpointError):
    """The save was not made because another one was still in flight (`when_busy="skip"`)."""


class SupersededError(SkippedError):
    """A checkpoint was committed on the disks of the nodes, but did not come home: a newer one has taken its place.

    Attributes:
        step: its own.
        by_step: that of the newer one; None if that is not known.
    """

    def __init__(self, message: str, step: int, by_step: int | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.by_step = by_step

    def __reduce__(self) -> tuple[type, tuple[str, int, int | None]]:
        return type(self), (str(self), self.step, self.by_step)


class FailedSavesError(CheckpointError):
    """`Options.max_failed_saves` saves in a row have failed; the cause of the last one is `__cause__`."""


class InUseError(CheckpointError):
    """Another job is writing to the directory."""


class ClosedError(CheckpointError):
    """The Checkpointer or its engine is closed."""


class ForkedError(CheckpointError):
    """A forked child used what belongs to its parent."""


class CancelledError(CheckpointError):
    """The save was interrupted before it was captured."""


class UnsupportedError(CheckpointError):
    """What was given cannot be saved in the way that was asked for, on any rank; nothing was begun."""


class DeviceError(CheckpointError):
    """The CUDA driver is missing, or one of its calls failed; tensors in host memory can still be saved.

    Attributes:
        code: the driver's result code (CUresult); 0 if there is none.
    """

    code = 0

    @property
    def capturing(self) -> bool:
        """Whether it was refused because a stream is being captured into a graph."""
        return self.code in (900, 906)  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, _IMPLICIT

    @property
    def in_other_context(self) -> bool:
        """Whether it was refused because a stream belongs to another context than the primary one, as a green one."""
        return self.code == 201  # CUDA_ERROR_INVALID_CONTEXT


class PeerError(CheckpointError):
    """Other ranks of the job have failed, or did not answer in time.

    Attributes:
        ranks: those that did not answer, or have failed, in order; empty if that is not known.
        payloads: what the others sent, by rank, where it is known; else empty.
    """

    def __init__(self, message: str, ranks: Iterable[int] = (), payloads: Mapping[int, bytes] | None = None) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.payloads = dict(payloads or {})

    def __reduce__(self) -> tuple[type, tuple[str, tuple[int, ...], dict[int, bytes]]]:
        return type(self), (str(self), self.ranks, self.payloads)
