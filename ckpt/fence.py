"""The fence: after it training may write to the tensors of every save in flight. And the hooks that make it automatic.

Torch's global step pre-hook hands us each optimizer before it writes: the fence is passed there, and from then on that
optimizer is known as one whose steps are fenced. What saves have in flight is registered here by those who make it; this module
knows no more of it than what a fence asks of it.

Between the two hooks of a step nothing may leave lazily: the fence has passed, and the step is writing. A save may begin there
all the same, in a signal handler or on another thread.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from types import CodeType
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ckpt import _native, torch_private
from ckpt import devices as torch_devices


class Watched(Protocol):
    """A file of a save.

    Attributes:
        job: the native job; None as long as it is not submitted.
        devices: from which bytes are fetched.
    """

    job: Any
    devices: frozenset[int]

    def try_seal(self, ordered: bool = False) -> bool: ...


class Fenced(Protocol):
    """What writes the files."""

    def fence(self, streams: dict[int, int]) -> None: ...


_uncaptured: dict[int, tuple[Watched, Fenced]] = {}  # by id; what a fence has to look after
_fetched: dict[int, weakref.ref[Watched]] = {}  # by id; with bytes of devices, which may still be on their way behind a fence
_beginning: dict[object, int] = {}  # a token of each save that is looking for what is lazy -> its thread
_begun = threading.Condition()  # one of those is through
_SLICE_S = 0.1  # how often who waits for them looks by himself

# ---- saves in flight -------------------------------------------------------------------------------------------------


def watch(file: Watched, runtime: Fenced) -> None:
    """From now on fences look after it, until it is sealed."""
    _uncaptured[id(file)] = file, runtime
    if file.devices:
        _fetched[id(file)] = weakref.ref(file, functools.partial(_forget, id(file)))


def unwatch(file: Watched) -> None:
    _uncaptured.pop(id(file), None)


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


def _forget(key: int, _: object) -> None:
    _fetched.pop(key, None)


def _devices_at_work() -> set[int]:
    """From which copies may be going on. All of them are named to a fence: for those that are not, the host would wait."""
    files = [file for reference in list(_fetched.values()) if (file := reference()) is not None]
    return {device for file in files if file.job is None or not file.job.released for device in file.devices}


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


# ---- steps of optimizers ---------------------------------------------------------------------------------------------

_stepped: dict[int, weakref.ref[Optimizer]] = {}

# (thread, optimizer) -> the frame that called the pre-hook, by its id and its code: it lasts as long as the step. The frame
# itself would keep what the step has in its variables. A step that raises leaves its entry behind.
_running: dict[tuple[int, int], tuple[int, CodeType]] = {}


def _install_hooks() -> None:
    """An error in the hook before a step stops the step."""

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        known = _stepped.get(key)
        if known is None or known() is not optimizer:
            _stepped[key] = weakref.ref(optimizer, lambda _: _stepped.pop(key, None))
        caller = sys._getframe(1)
        # Before the fence: a save that does not see it is one that the fence sees.
        _running[threading.get_ident(), key] = id(caller), caller.f_code
        _before_step()

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _running.pop((threading.get_ident(), id(optimizer)), None)

    for hook in (before, after):
        torch_private.hide_from_compiler(hook)
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _before_step() -> None:
    if _uncaptured or _beginning:
        fence()


def stepped_optimizers() -> list[Optimizer]:
    """Those that have stepped, and still live."""
    return [optimizer for reference in list(_stepped.values()) if (optimizer := reference()) is not None]


def step_is_running() -> bool:
    """Whether any thread is inside a step of any optimizer. Steps that have raised are forgotten here."""
    for key, frame in list(_running.items()):
        if _is_on_stack(key[0], *frame):
            return True
        if _running.get(key) == frame:  # else it has begun anew meanwhile
            del _running[key]
    return False


def _is_on_stack(thread: int, frame_id: int, code: CodeType) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None and not (id(frame) == frame_id and frame.f_code is code):
        frame = frame.f_back
    return frame is not None


def _forget_after_fork() -> None:
    """In a forked child, where only this thread is left: what the parent has in flight is left alone, for ever."""
    global _begun
    _native.leak(dict(_uncaptured))
    _uncaptured.clear()
    _fetched.clear()
    _beginning.clear()
    _begun = threading.Condition()
    for key in [key for key in _running if key[0] != threading.get_ident()]:
        del _running[key]


_install_hooks()
os.register_at_fork(after_in_child=_forget_after_fork)
