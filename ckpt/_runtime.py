"""Engines, what is in flight on them, and the thread that commits.

A runtime is one native engine plus one committer thread, shared by everybody who saves with the same engine options. The
committer takes the saves in order: waits for capture, lets go of the tensors, waits for durable data, publishes.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt import _laziness, _native
from ckpt._file_save import FileSave
from ckpt.errors import CheckpointError, ClosedError, DeadlineError, SkippedError
from ckpt.options import Options
from ckpt.pending import PendingSave

logger = logging.getLogger("ckpt")

_SLICE_S = 0.2  # how often a waiting background thread looks whether it is to stop
_JOIN_S = 30.0  # for the committer to come back from the publication it is in
# Gets the error that has ended the save, if any; returns the path that it published, or raises. Called for failed saves too,
# because other ranks may be waiting for word from this one.
Publish = Callable[[BaseException | None], Path]


class Runtime:
    def __init__(self, options: Options) -> None:
        self._engine: Any = _native.Engine(
            arena_bytes=options.size("arena_bytes"), chunk_bytes=options.size("chunk_bytes"), writers=options.writers
        )
        self._leases = 0  # guarded by _registry_lock, as the next two
        self._kept = False
        self._drain_timeout_s = 0.0  # the longest that anybody who shares this engine asked for
        self._changed = threading.Condition()
        self._in_flight = 0  # guarded by _changed
        self._stopping = False  # guarded by _changed
        self._given_up = False  # the drain's deadline has passed: the committer waits for nothing any more
        self._queue: queue.SimpleQueue[tuple[PendingSave, Publish, bool] | None] = queue.SimpleQueue()
        self._committer = threading.Thread(target=self._commit_all, name="ckpt-committer", daemon=True)
        self._committer.start()

    # ---- saving ----------------------------------------------------------------------------------------------------

    def admit(self, pending: PendingSave, options: Options) -> None:
        """Takes one of the places in flight for this save; waits for one or refuses, as the options say.

        Raises:
            SkippedError, DeadlineError: there was none.
            ClosedError: the runtime is closed.
        """
        with self._changed:
            if self._in_flight >= options.max_in_flight and options.when_busy == "skip":
                raise SkippedError(
                    f"the save to '{pending.path}' was skipped: {self._in_flight} earlier ones are still in flight"
                )
            free = self._changed.wait_for(lambda: self._in_flight < options.max_in_flight or self._stopping, options.timeout_s)
            if self._stopping:
                raise ClosedError("the interpreter or the checkpoint engine is shutting down; no more saves are taken")
            if not free:
                raise DeadlineError(
                    f"no earlier save became durable within {options.timeout_s} s, so the one to '{pending.path}' was not "
                    "begun; the storage is too slow or hangs"
                )
            self._in_flight += 1

    def release(self) -> None:
        """Gives the place back."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def submit(self, **arguments: Any) -> Any:
        """The native job for a planned file; see Engine.submit in csrc/bindings.cc."""
        return self._engine.submit(**arguments)

    def commit_later(self, pending: PendingSave, publish: Publish) -> None:
        """Hands an admitted and submitted save to the committer, which also releases its place."""
        pending._handed_over = True
        self._queue.put((pending, publish, True))

    def attend(self, pending: PendingSave, publish: Publish) -> None:
        """The same for a save that was never admitted, so that the other ranks hear of it in its turn."""
        self._queue.put((pending, publish, False))

    def fence(self) -> None:
        engine = self._engine
        if engine is not None:  # else it was closed: whatever was in flight is durable or has failed
            engine.fence()

    # ---- committing ------------------------------------------------------------------------------------------------

    def _commit_all(self) -> None:
        while (item := self._queue.get()) is not None:
            pending, publish, admitted = item
            published, error = None, None
            try:
                published = publish(self._finish(pending))
            except BaseException as caught:  # whatever it is must reach result(), never die with this thread
                error = caught.with_traceback(None)  # whose frames would keep the state alive
                pending._discard()
            pending._let_go()
            if admitted:
                self.release()  # first, so that whoever waits for the outcome finds the place free
            if published is not None:
                pending._succeed(published)
            elif error is not None:
                pending._fail(error)
            del item, pending, publish, published, error  # else the last save would live until the next

    def _finish(self, pending: PendingSave) -> BaseException | None:
        """Waits until all files are written and durable under their temporary names; what went wrong, if anything."""
        try:
            for file in pending._files:
                self._await(file, file.job.wait_captured)
                file.try_seal()
            for file in pending._files:
                self._await(file, file.job.wait_finished)
                file.try_seal()
        except DeadlineError as given_up:
            for file in pending._files:
                orphan(file.memory)  # a writer may still read it
            return given_up
        errors = [error for file in pending._files if (error := file.error()) is not None]
        for file in pending._files:
            file.let_go()
            _note_buffered(file)
        return pending._begin_error or (errors[0] if errors else None)

    def _await(self, file: FileSave, done: Callable[[float], bool]) -> None:
        while not done(_SLICE_S):
            if self._given_up:
                raise DeadlineError(f"the save to '{file.target}' was given up: its storage does not answer")

    # ---- the end ---------------------------------------------------------------------------------------------------

    def wait_idle(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight == 0, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Drains, then fails what the deadline leaves, and ends all threads but one that hangs in the kernel."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify_all()
        try:
            if not self.wait_idle(timeout_s):
                logger.error("saves in flight are given up: they did not become durable within %s s", timeout_s)
            self._given_up = not self._engine.close(0.0)
        except BaseException:  # Ctrl-C
            self._given_up = True
            raise
        finally:  # no thread of ours may be inside the engine when the interpreter goes
            self._queue.put(None)
            self._join_committer()
            self._engine = None  # joins the writers; leaks them if one hangs

    def _join_committer(self) -> None:
        deadline = time.monotonic() + _JOIN_S
        while self._committer.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(KeyboardInterrupt):
                self._committer.join(_SLICE_S)


_noted_buffered: set[int] = set()


def _note_buffered(file: FileSave) -> None:
    """Says once for each file system that it has no direct I/O."""
    if file.job.error is not None or file.job.stats["direct_io"] or not file.wants_direct:
        return
    try:
        device = os.stat(file.target.parent).st_dev
    except OSError:
        return
    if device not in _noted_buffered:
        _noted_buffered.add(device)
        logger.warning(
            "the file system of '%s' has no usable direct I/O: saves go through the page cache, which costs a copy and memory "
            "bandwidth",
            file.target.parent,
        )


# ---- the process-wide registry ---------------------------------------------------------------------------------------

_registry_lock = threading.Lock()
_runtimes: dict[tuple[Any, ...], Runtime] = {}
_exiting = False  # guarded by _registry_lock
_uncaptured: dict[int, tuple[FileSave, Runtime]] = {}  # by id; what a fence has to look after


def lease(options: Options) -> Runtime:
    """The runtime for these options, made if there is none yet. Pair with give_back().

    Raises:
        ClosedError: the interpreter is shutting down.
    """
    key = (options.arena_bytes, options.chunk_bytes, options.writers)
    with _registry_lock:
        if _exiting:
            raise ClosedError("the interpreter is shutting down: pending saves have been drained, and no more are taken")
        runtime = _runtimes.get(key)
        if runtime is None:
            runtime = _runtimes[key] = Runtime(options)
        runtime._leases += 1
        runtime._drain_timeout_s = max(runtime._drain_timeout_s, options.drain_timeout_s)
        return runtime


def keep(options: Options) -> Runtime:
    """The runtime for these options, for the life of the process: the next save finds a warm arena."""
    runtime = lease(options)
    with _registry_lock:
        if runtime._kept:
            runtime._leases -= 1
        runtime._kept = True
    return runtime


def give_back(runtime: Runtime, timeout_s: float) -> None:
    """Closes the runtime when its last lease goes."""
    with _registry_lock:
        runtime._leases -= 1
        if runtime._leases > 0:
            return
        for key in [key for key, value in _runtimes.items() if value is runtime]:
            del _runtimes[key]
    runtime.close(timeout_s)


def watch(file: FileSave, runtime: Runtime) -> None:
    """From now on fences look after it, until it is sealed."""
    _uncaptured[id(file)] = file, runtime


def unwatch(file: FileSave) -> None:
    _uncaptured.pop(id(file), None)


def orphan(memory: Any) -> None:
    """Keeps it for ever, past the end of the interpreter too: a hanging writer may read it when it comes back."""
    _native.leak(memory)


def fence() -> None:
    """Waits until every save in flight has captured its tensors; after it they may change.

    Called automatically before every step of a `torch.optim.Optimizer`. Call it by hand before anything else that writes to
    saved tensors and fires no optimizer hook: replaying a CUDA graph that holds the step, functional optimizers, manual
    updates, loading a state dict, swapping in EMA weights.

    Not for memory that goes away: `share_memory_()`, `resize_()` and the like free what a background write may still be
    reading. Wait with `result()`, or save such tensors with `lazy=False`.

    A save that cannot be captured within `Options.timeout_s` fails instead, so that training goes on; so does one whose
    tensors were found changed.

    Raises:
        KeyboardInterrupt: Ctrl-C during the wait; the tensors must not be changed then.
    """
    watched = list(_uncaptured.values())
    for runtime in {runtime for _, runtime in watched}:
        runtime.fence()
    for file, _ in watched:
        file.try_seal()


def _before_step() -> None:
    if _uncaptured:
        fence()


def _drain_at_exit() -> None:
    global _exiting
    with _registry_lock:
        _exiting = True
        runtimes = list(_runtimes.values())
        _runtimes.clear()
    for runtime in runtimes:
        try:
            runtime.close(runtime._drain_timeout_s)
        except CheckpointError:
            logger.exception("draining saves at exit failed")


def _forget_after_fork() -> None:
    """In a forked child: the parent's threads do not exist, its locks may be held for ever. Leave all of it alone."""
    global _registry_lock
    _registry_lock = threading.Lock()
    orphan((dict(_runtimes), dict(_uncaptured)))
    _runtimes.clear()
    _uncaptured.clear()


_laziness.install_hook(_before_step)
atexit.register(_drain_at_exit)
os.register_at_fork(after_in_child=_forget_after_fork)
