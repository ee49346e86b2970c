"""Engines, and what is in flight on them.

A runtime is one native engine, shared by everybody who saves with the same engine options, and the finishers that take those
saves to their end.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ckpt import _native, device_modes
from ckpt import devices as torch_devices
from ckpt.errors import CheckpointError, ClosedError, DeviceError
from ckpt.metrics.registry import PROCESS, Reading
from ckpt.options import AUTO, Options
from ckpt.saving.arena_size import most_arena_bytes, needed_arena_bytes
from ckpt.saving.background import SaveFinisher

logger = logging.getLogger("ckpt")


class Runtime:
    def __init__(self, options: Options) -> None:
        self._sizes_itself = options.arena_bytes == AUTO
        self._engine: Any = _native.Engine(
            arena_bytes=options.size("arena_bytes"),
            most_arena_bytes=most_arena_bytes() if self._sizes_itself else 0,
            chunk_bytes=options.size("chunk_bytes"),
            writers=options.writers,
            cuda_library=torch_devices.in_use.driver,
            device_cache_bytes=options.size("device_cache"),
            device_batches=options.device_batches,
            device_rate=options.size("device_rate"),
        )
        if devices := torch_devices.at_work():
            if options.device_lazy is True:
                self._engine.open_devices(devices)
            elif options.device_lazy == AUTO and device_modes.mode_of(devices, AUTO)[0] != "host":
                self.try_open(devices)
        self._leases = 0  # guarded by _registry_lock, as the next two
        self._kept: SaveFinisher | None = None
        self._drain_timeout_s = 0.0  # the longest that anybody who shares this engine asked for
        self._lock = threading.Lock()
        self._closed = False  # guarded by _lock, as the next
        self._finishers: list[SaveFinisher] = []

    def finisher(self, interrupt: Callable[[], None] | None = None, farewell: Callable[[], None] | None = None) -> SaveFinisher:
        """A new one, which drains with this runtime.

        Raises:
            ClosedError: the runtime is closed, or the interpreter is shutting down.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the checkpoint engine is shutting down")
            self._finishers = [finisher for finisher in self._finishers if finisher.alive]
            finisher = SaveFinisher(interrupt, farewell)
            self._finishers.append(finisher)
            return finisher

    def try_open(self, devices: Collection[int]) -> str:
        """Gets the engine ready for saves from these; why it cannot be, which is noted, or nothing."""
        try:
            self._engine.open_devices(sorted(devices))
        except DeviceError as error:
            device_modes.note_unusable(devices, str(error))
            return str(error)
        return ""

    def make_room(self, device_bytes: int) -> None:
        """For a save with so many bytes on devices, if the arena sizes itself."""
        if self._sizes_itself and device_bytes > 0:
            self._engine.grow_arena(needed_arena_bytes(device_bytes))

    def submit(self, **arguments: Any) -> Any:
        """The native job for a planned file; see Engine.submit in csrc/bindings/engine.cc."""
        return self._engine.submit(**arguments)

    def fence(self, streams: dict[int, int]) -> None:
        engine = self._engine
        if engine is not None:  # else it was closed: whatever was in flight is durable or has failed
            engine.fence(streams)

    def order(self, streams: dict[int, int]) -> None:
        """Behind copies that fences have left to go on."""
        engine = self._engine
        if engine is not None:
            engine.order(streams)

    # ---- what it is at, just now; never waits ----------------------------------------------------------------------

    @property
    def arena_used(self) -> int:
        """Bytes."""
        engine = self._engine
        return 0 if engine is None else int(engine.arena_used)

    @property
    def arena_limit(self) -> int:
        """Bytes to which it may grow."""
        engine = self._engine
        return 0 if engine is None else max(int(engine.arena_bytes), int(engine.most_arena_bytes))

    @property
    def in_flight(self) -> int:
        """Saves that have no outcome yet."""
        return sum(finisher.owed for finisher in self._finishers)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float) -> None:
        """Drains, then fails what the deadline leaves, and ends all threads but one that hangs in the kernel."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            finishers = self._finishers
        for finisher in finishers:
            finisher.stop_admitting()
        deadline = time.monotonic() + timeout_s
        try:
            if not all(finisher.wait_idle(max(0.0, deadline - time.monotonic())) for finisher in finishers):
                logger.error("saves in flight are given up: they did not become durable within %s s", timeout_s)
        finally:  # after Ctrl-C too: no thread of ours may be inside the engine when the interpreter goes
            try:
                for finisher in finishers:
                    finisher.give_up()
                self._engine.close(0.0)
            finally:
                for finisher in finishers:
                    finisher.end()
                self._engine = None  # joins the writers; leaks them if one hangs


# ---- the process-wide registry ---------------------------------------------------------------------------------------

# Reentrant, as all locks that a finalizer takes: the collector may run it on the thread that holds the lock.
_registry_lock = threading.RLock()
_runtimes: dict[tuple[Any, ...], Runtime] = {}
_exiting = False  # guarded by _registry_lock
_drained_process = 0  # guarded by _registry_lock: the child of multiprocessing that drains when it ends
_BEHIND_OTHERS = -100  # of multiprocessing's finalizers, which may still save


def lease(options: Options) -> Runtime:
    """The runtime for these options, made if there is none yet. Pair with give_back().

    Raises:
        ClosedError: the interpreter is shutting down.
    """
    key = (
        *(options.arena_bytes, options.chunk_bytes, options.writers),
        *(options.device_cache, options.device_batches, options.device_rate),
    )
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


def keep(options: Options) -> tuple[Runtime, SaveFinisher]:
    """The runtime for these options, for the life of the process: the next save finds a warm arena.

    With the finisher of the saves of single files, which wait for nobody else.
    """
    runtime = lease(options)
    with _registry_lock:
        if runtime._kept is None:
            runtime._kept = runtime.finisher()
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


def orphan(memory: Any) -> None:
    """Keeps it for ever, past the end of the interpreter too: a hanging writer may read it when it comes back."""
    _native.leak(memory)


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
        for finisher in runtime._finishers:
            if finisher.farewell is not None:
                finisher.farewell()


def _forget_after_fork() -> None:
    """In a forked child: the parent's threads do not exist, its locks may be held for ever. Leave all of it alone."""
    global _registry_lock
    _registry_lock = threading.RLock()
    orphan(dict(_runtimes))
    _runtimes.clear()


def _gauges() -> Iterator[Reading]:
    runtimes = list(_runtimes.values())
    yield "ckpt.in_flight", sum(runtime.in_flight for runtime in runtimes), {}
    yield "ckpt.arena.usage", sum(runtime.arena_used for runtime in runtimes), {}
    yield "ckpt.arena.limit", sum(runtime.arena_limit for runtime in runtimes), {}


PROCESS.watch(_gauges)
atexit.register(_drain_at_exit)
os.register_at_fork(after_in_child=_forget_after_fork)
