"""Engines, and what is in flight on them.

A runtime is one native engine, shared by everybody who saves with the same engine options, and the committers that take those
saves to their end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import multiprocessing.util
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from ckpt import _native
from ckpt import devices as torch_devices
from ckpt.errors import CheckpointError, ClosedError
from ckpt.options import Options
from ckpt.plan import lazy_storages
from ckpt.saving.background import Committer
from ckpt.saving.file_in_flight import FileSave

logger = logging.getLogger("ckpt")


class Runtime:
    def __init__(self, options: Options) -> None:
        self._engine: Any = _native.Engine(
            arena_bytes=options.size("arena_bytes"),
            chunk_bytes=options.size("chunk_bytes"),
            writers=options.writers,
            cuda_library=torch_devices.driver,
            device_cache_bytes=options.size("device_cache"),
        )
        if options.device_lazy and (devices := torch_devices.at_work()):
            self._engine.open_devices(devices)
        self._leases = 0  # guarded by _registry_lock, as the next two
        self._kept: Committer | None = None
        self._drain_timeout_s = 0.0  # the longest that anybody who shares this engine asked for
        self._lock = threading.Lock()
        self._closed = False  # guarded by _lock, as the next
        self._committers: list[Committer] = []

    def committer(self, interrupt: Callable[[], None] | None = None, farewell: Callable[[], None] | None = None) -> Committer:
        """A new one, which drains with this runtime.

        Raises:
            ClosedError: the runtime is closed.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the checkpoint engine is shutting down")
            self._committers = [committer for committer in self._committers if committer.alive]
            committer = Committer(interrupt, farewell)
            self._committers.append(committer)
            return committer

    def submit(self, **arguments: Any) -> Any:
        """The native job for a planned file; see Engine.submit in csrc/bindings/engine.cc."""
        return self._engine.submit(**arguments)

    def fence(self, streams: dict[int, int]) -> None:
        engine = self._engine
        if engine is not None:  # else it was closed: whatever was in flight is durable or has failed
            engine.fence(streams)

    def close(self, timeout_s: float) -> None:
        """Drains, then fails what the deadline leaves, and ends all threads but one that hangs in the kernel."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            committers = self._committers
        for committer in committers:
            committer.stop_admitting()
        deadline = time.monotonic() + timeout_s
        try:
            if not all(committer.wait_idle(max(0.0, deadline - time.monotonic())) for committer in committers):
                logger.error("saves in flight are given up: they did not become durable within %s s", timeout_s)
        finally:  # after Ctrl-C too: no thread of ours may be inside the engine when the interpreter goes
            try:
                for committer in committers:
                    committer.give_up()
                self._engine.close(0.0)
            finally:
                for committer in committers:
                    committer.end()
                self._engine = None  # joins the writers; leaks them if one hangs


# ---- the process-wide registry ---------------------------------------------------------------------------------------

# Reentrant, as all locks that a finalizer takes: the collector may run it on the thread that holds the lock.
_registry_lock = threading.RLock()
_runtimes: dict[tuple[Any, ...], Runtime] = {}
_exiting = False  # guarded by _registry_lock
_drained_process = 0  # guarded by _registry_lock: the child of multiprocessing that drains when it ends
_uncaptured: dict[int, tuple[FileSave, Runtime]] = {}  # by id; what a fence has to look after
_fetched: dict[int, weakref.ref[FileSave]] = {}  # by id; with bytes of devices, which may still be on their way behind a fence
_beginning: dict[object, int] = {}  # a token of each save that is looking for what is lazy -> its thread
_begun = threading.Condition()  # one of those is through
_BEHIND_OTHERS = -100  # of multiprocessing's finalizers, which may still save
_SLICE_S = 0.1  # how often who waits for them looks by himself


def lease(options: Options) -> Runtime:
    """The runtime for these options, made if there is none yet. Pair with give_back().

    Raises:
        ClosedError: the interpreter is shutting down.
    """
    key = (options.arena_bytes, options.chunk_bytes, options.writers, options.device_cache)
    with _registry_lock:
        if _exiting:
            raise ClosedError("the interpreter is shutting down: pending saves have been drained, and no more are taken")
        runtime = _runtimes.get(key)
        if runtime is None:
            _drain_with_multiprocessing()
            runtime = _runtimes[key] = Runtime(options)
        runtime._leases += 1
        runtime._drain_timeout_s = max(runtime._drain_timeout_s, options.drain_timeout_s)
        return runtime


def keep(options: Options) -> tuple[Runtime, Committer]:
    """The runtime for these options, for the life of the process: the next save finds a warm arena.

    With the committer of the saves of single files, which wait for nobody else.
    """
    runtime = lease(options)
    with _registry_lock:
        if runtime._kept is None:
            runtime._kept = runtime.committer()
        else:
            runtime._leases -= 1
        return runtime, runtime._kept


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
    if file.devices:
        _fetched[id(file)] = weakref.ref(file, functools.partial(_forget, id(file)))


@contextlib.contextmanager
def beginning() -> Iterator[None]:
    """Around all from the question what is lazy until the lazy bytes are watched: no fence of another thread passes meanwhile.

    Else it might pass between the two, and what is written behind it would be in the file.
    """
    token = object()
    try:
        _beginning[token] = threading.get_ident()
        yield
    finally:
        _beginning.pop(token, None)
        with _begun:
            _begun.notify_all()


def _await_beginnings() -> None:
    """Of other threads: each ends by its own deadline. A fence of the same one comes from a signal handler, or out of what is
    being pickled.
    """
    tokens = {token for token, thread in list(_beginning.items()) if thread != threading.get_ident()}
    while tokens & _beginning.keys():
        with _begun:
            _begun.wait(_SLICE_S)


def unwatch(file: FileSave) -> None:
    _uncaptured.pop(id(file), None)


def _forget(key: int, _: object) -> None:
    _fetched.pop(key, None)


def _devices_at_work() -> set[int]:
    """From which copies may be going on. All of them are named to a fence: for those that are not, the host would wait."""
    files = [file for reference in list(_fetched.values()) if (file := reference()) is not None]
    return {device for file in files if file.job is None or not file.job.released for device in file.devices}


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

    Of tensors on devices (`Options.device_lazy`) it only enqueues the copies, and lets the stream that is current for each of
    these devices wait for them: other streams that are to write must wait for that one. It cannot be called while a stream is
    being captured into a graph: call it before the capture begins, and before each replay.

    A save that cannot be captured within `Options.timeout_s` fails instead, so that training goes on; so does one whose
    tensors were found changed.

    Raises:
        KeyboardInterrupt: Ctrl-C during the wait; the tensors must not be changed then.
        DeviceError: a current stream is being captured into a graph, or the CUDA driver failed; nothing may be changed then.
    """
    _await_beginnings()
    watched = list(_uncaptured.values())
    streams = torch_devices.streams_of(_devices_at_work())
    for runtime in {runtime for _, runtime in watched}:
        runtime.fence(streams)
    for file, _ in watched:
        file.try_seal(ordered=True)


def _before_step() -> None:
    if _uncaptured or _beginning:
        fence()


def _drain_with_multiprocessing() -> None:
    """A child of multiprocessing, such as a notebook's launcher starts, may end by os._exit(): then only these are called."""
    global _drained_process
    if multiprocessing.parent_process() is not None and _drained_process != os.getpid():
        _drained_process = os.getpid()
        multiprocessing.util.Finalize(None, _drain_at_exit, exitpriority=_BEHIND_OTHERS)


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
        for committer in runtime._committers:
            if committer.farewell is not None:
                committer.farewell()


def _forget_after_fork() -> None:
    """In a forked child: the parent's threads do not exist, its locks may be held for ever. Leave all of it alone."""
    global _registry_lock, _begun
    _registry_lock = threading.RLock()
    orphan((dict(_runtimes), dict(_uncaptured)))
    _runtimes.clear()
    _uncaptured.clear()
    _fetched.clear()
    _beginning.clear()
    _begun = threading.Condition()
    lazy_storages.forget_threads()


lazy_storages.install_hooks(_before_step)
atexit.register(_drain_at_exit)
os.register_at_fork(after_in_child=_forget_after_fork)
