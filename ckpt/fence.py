"""The fence: after it training may write to the tensors of every save in flight. And the hooks that make it automatic.

Torch's global step pre-hook hands us each optimizer before it writes: the fence is passed there, and from then on that
optimizer is known as one whose steps are fenced. What saves have in flight is registered here by those who make it; this module
knows no more of it than what a fence asks of it.

From the hook before a step until that step has returned nothing may leave lazily: the fence has passed, and the step is
writing. A save may begin there all the same, in a signal handler or on another thread.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import itertools
import logging
import os
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from types import CodeType, FrameType
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ckpt import _native, torch_private
from ckpt import devices as torch_devices

logger = logging.getLogger("ckpt")


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

    def order(self, streams: dict[int, int]) -> None: ...


_uncaptured: dict[int, tuple[Watched, Fenced]] = {}  # by id; what a fence has to look after
# By id; with bytes of devices, which may still be on their way behind the fence that has sealed the file.
_fetched: dict[int, tuple[weakref.ref[Watched], Fenced]] = {}
_beginning: dict[object, int] = {}  # a token of each save that is looking for what is lazy -> its thread
_begun = threading.Condition()  # one of those is through
_SLICE_S = 0.1  # how often who waits for them looks by himself

# ---- saves in flight -------------------------------------------------------------------------------------------------


def watch(file: Watched, runtime: Fenced) -> None:
    """From now on fences look after it, until it is sealed."""
    _uncaptured[id(file)] = file, runtime
    if file.devices:
        _fetched[id(file)] = weakref.ref(file, functools.partial(_forget, id(file))), runtime


def unwatch(file: Watched) -> None:
    """It is sealed, or fails: also before it was submitted, and then nothing of it will be published."""
    _uncaptured.pop(id(file), None)
    if file.job is None:
        _fetched.pop(id(file), None)


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


class Hold:
    """Of a save that one thread has begun and another one will submit: from now until release(), fences wait.

    Args:
        timeout_s: how long a fence waits; then this is lost, and what it was for must not be saved any more.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.lost = False  # guarded by _begun
        _beginning[self] = _NO_THREAD

    def release(self) -> bool:
        """False if a fence has not waited for it. Safe to call again."""
        with _begun:
            _beginning.pop(self, None)
            _begun.notify_all()
            return not self.lost

    def _lose(self) -> None:
        with _begun:
            if _beginning.pop(self, None) is None:
                return
            self.lost = True
        logger.error("a fence has waited %s s for a save that was not submitted: it is given up", self.timeout_s)


_NO_THREAD = 0


def _await_beginnings() -> None:
    """Of other threads: each ends by its own deadline. A fence of the same one comes from a signal handler, or out of what is
    being pickled.
    """
    tokens = {token for token, thread in list(_beginning.items()) if thread != threading.get_ident()}
    began = time.monotonic()
    while waiting := tokens & _beginning.keys():
        for token in waiting:
            if isinstance(token, Hold) and time.monotonic() > began + token.timeout_s:
                token._lose()
        with _begun:
            _begun.wait(_SLICE_S)


def _forget(key: int, _: object) -> None:
    _fetched.pop(key, None)


def _still_fetched() -> list[tuple[Watched, Fenced]]:
    """Those from whose devices copies may be going on. The others are forgotten."""
    found = []
    for key, (reference, runtime) in list(_fetched.items()):
        file = reference()
        if file is not None and (file.job is None or not file.job.released):
            found.append((file, runtime))
        else:
            _fetched.pop(key, None)
    return found


def fence() -> None:
    """Waits until every save in flight has captured its tensors; after it they may change.

    Called automatically before every step of a `torch.optim.Optimizer`. Call it by hand before anything else that writes to
    saved tensors and fires no optimizer hook: functional optimizers, manual updates, loading a state dict, swapping in EMA
    weights, a forward that writes to its weights (`nn.Embedding(max_norm=)`), replaying a CUDA graph that holds the step. (Of
    an optimizer that was seen being captured, only what is declared by `lazy=` needs that: all else is copied in save().)

    Not for memory that goes away: `share_memory_()`, `resize_()` and the like free what a background write may still be
    reading. Wait with `result()`, or save such tensors with `lazy=False`.

    Of tensors on devices (`Options.device_lazy`) it only enqueues the copies, and lets the stream that is current for each of
    these devices wait for them. Other streams that are to write must wait for that one, or be current at a fence of their own:
    until the copies have ended, each fence (and each step of an optimizer) lets its current streams wait for them. It cannot be
    called while a stream is being captured into a graph: call it before the capture begins, and before each replay.

    A save that cannot be captured within `Options.timeout_s` fails instead, so that training goes on; so does one whose
    tensors were found changed.

    Raises:
        KeyboardInterrupt: Ctrl-C during the wait; the tensors must not be changed then.
        DeviceError: a current stream is being captured into a graph, or the CUDA driver failed; nothing may be changed then.
    """
    _await_beginnings()
    watched, fetched = list(_uncaptured.values()), _still_fetched()
    # All of them are named: for a device that is not, the host would wait.
    streams = torch_devices.streams_of({device for file, _ in fetched for device in file.devices})
    fencing = {runtime for _, runtime in watched}
    for runtime in fencing:
        runtime.fence(streams)
    # What an earlier fence has sealed may still be read by copies, for which only its own streams wait. Which these were is not
    # remembered: a handle may be that of another stream by now, and to wait once more costs nothing.
    for runtime in {runtime for _, runtime in fetched} - fencing:
        runtime.order(streams)
    for file, _ in watched:
        file.try_seal(ordered=True)


# ---- steps of optimizers ---------------------------------------------------------------------------------------------

_stepped: dict[int, weakref.ref[Optimizer]] = {}
_paces: dict[int, collections.deque[float]] = {}  # the instants of the last steps of each
_PACES = 6
_MOST_PACES = 1000  # optimizers; more are forgotten, as those that are gone are
_replayed: dict[int, weakref.ref[Optimizer]] = {}  # of them, those of which a step was captured into a graph


class _Step:
    """It lasts as long as a frame is on its thread's stack: that which called the hook before it, or an outer one.

    Of frames only the identity is kept: one itself would keep what the step has in its variables.
    """

    __slots__ = ("caller", "code", "frame", "has_ended", "optimizer", "thread", "times")

    def __init__(self, optimizer: int, caller: FrameType, outermost: FrameType) -> None:
        self.thread = threading.get_ident()
        self.optimizer = optimizer
        self.caller = id(caller)
        self.frame, self.code = id(outermost), outermost.f_code
        self.times = 1  # that it was begun: a compiler may make one frame of a step and of that which it calls
        self.has_ended = False  # the hook behind it was called, and its frame may be still there

    def is_on(self, frame: FrameType) -> bool:
        return id(frame) == self.frame and frame.f_code is self.code


# Those that are running, in the order in which they have begun, and some that have ended and were not forgotten yet. Each is an
# object of its own, so that to forget one cannot take away another of the same thread and optimizer, as where a step calls the
# one that it inherits.
_running: dict[_Step, None] = {}
_MOST_FORGOTTEN = 100  # of threads that are gone


def _install_hooks() -> None:
    """An error in the hook before a step stops the step."""

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        _note_pace(key)
        known = _stepped.get(key)
        if known is None or known() is not optimizer:
            _stepped[key] = weakref.ref(optimizer, lambda _: _stepped.pop(key, None))
        # Before the fence: a save that does not see it is one that the fence sees.
        _note_step(key, sys._getframe(1))
        if torch_devices.is_capturing():
            _note_capture(optimizer)
        _before_step(key)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _note_end(id(optimizer), sys._getframe(1))

    for hook in (before, after):
        torch_private.hide_from_compiler(hook)
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _note_step(optimizer: int, caller: FrameType) -> None:
    """And forgets those of this thread that have ended."""
    own = _own_steps()
    frames, outermost = {step.frame for step in own}, caller
    alive: set[_Step] = set()
    frame: FrameType | None = caller
    while frame is not None:
        if id(frame) in frames:
            alive.update(step for step in own if step.is_on(frame))
        if frame.f_code.co_name == "step" and _is_step_of_optimizer(frame.f_code):
            outermost = frame
        frame = frame.f_back
    new = _Step(optimizer, caller, outermost)
    for step in own:
        # One may seem to live because its frame's place is used again.
        same = step.frame == new.frame
        again = same and step.caller == new.caller and step.optimizer == optimizer and not step.has_ended
        if again:
            new.times += step.times
        if again or step not in alive or (same and step.has_ended):
            _running.pop(step, None)
    if len(_running) > _MOST_FORGOTTEN:
        step_is_running()
    _running[new] = None


def _note_end(optimizer: int, caller: FrameType) -> None:
    """Nothing is forgotten, mostly: hooks behind ours may write as well, and so may a step that has called this one.

    What torch.compile makes of a step may call its hooks from several frames, one of which may stay for long.
    """
    own = [step for step in reversed(_own_steps()) if step.optimizer == optimizer and not step.has_ended]
    for step in own:
        if step.caller == id(caller):
            step.has_ended = True
            return
    if own and own[0].frame == own[0].caller:
        own[0].times -= 1
        if own[0].times == 0:
            _running.pop(own[0], None)


def _own_steps() -> list[_Step]:
    thread = threading.get_ident()
    return [step for step in list(_running) if step.thread == thread]


_steps: weakref.WeakKeyDictionary[CodeType, bool] = weakref.WeakKeyDictionary()


def _is_step_of_optimizer(code: CodeType) -> bool:
    """Also of one that was never initialised, and fires no hooks: it steps another, and may write behind that."""
    known = _steps.get(code)
    if known is None:
        known = _steps[code] = any(_code_of(kind.__dict__.get("step")) is code for kind in _kinds_of(Optimizer))
    return known


def _kinds_of(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds_of(each)


def _code_of(step: Any) -> CodeType | None:
    """Of the function itself, inside of what decorates it."""
    return getattr(inspect.unwrap(step), "__code__", None)


class Follower(Protocol):
    """Is told of each iteration: see tiers/pace.py."""

    def note_fence(self, now: float, beat: Hashable) -> None: ...

    def capturing(self, clock: Callable[[], float]) -> contextlib.AbstractContextManager[None]: ...


_followers: list[Follower] = []


def follow(follower: Follower) -> None:
    _followers.append(follower)


def unfollow(follower: Follower) -> None:
    """Safe to call again."""
    with contextlib.suppress(ValueError):
        _followers.remove(follower)


def _before_step(optimizer: int) -> None:
    now = time.monotonic()
    for follower in _followers:
        follower.note_fence(now, optimizer)
    if not (_uncaptured or _beginning or _fetched):
        return
    with contextlib.ExitStack() as stack:
        for follower in _followers:
            stack.enter_context(follower.capturing(time.monotonic))
        fence()


def _note_capture(optimizer: Optimizer) -> None:
    """From now on a replay may write to its tensors at any time, by no call of ours."""
    key = id(optimizer)
    known = _replayed.get(key)
    if known is not None and known() is optimizer:
        return
    _replayed[key] = weakref.ref(optimizer, lambda _: _replayed.pop(key, None))
    logger.warning(
        "a step of %s is being captured into a CUDA graph, whose replays call no hook: from now on its tensors are copied "
        "inside save(); to save them lazily, name them by lazy= and call ckpt.fence() before each replay",
        type(optimizer).__name__,
    )


def _note_pace(key: int) -> None:
    paces = _paces.get(key)
    if paces is None:
        if len(_paces) >= _MOST_PACES:
            _paces.clear()
        paces = _paces[key] = collections.deque(maxlen=_PACES)
    paces.append(time.monotonic())


def iteration_s() -> float | None:
    """How long an iteration takes just now, seconds: the median time between the last steps of the optimizer that stepped last.

    None as long as none has stepped a few times.
    """
    instants = max(
        (list(paces) for key, paces in list(_paces.items()) if key in _stepped), key=lambda each: each[-1], default=[]
    )
    if len(instants) < _PACES:
        return None
    return statistics.median(after - before for before, after in itertools.pairwise(instants))


def stepped_optimizers() -> list[Optimizer]:
    """Those that have stepped, and still live."""
    return _living(_stepped)


def replayed_optimizers() -> list[Optimizer]:
    """Those of them that graphs may step, behind our back."""
    return _living(_replayed)


def _living(references: dict[int, weakref.ref[Optimizer]]) -> list[Optimizer]:
    return [optimizer for reference in list(references.values()) if (optimizer := reference()) is not None]


def step_is_running() -> bool:
    """Whether any thread is inside a step of any optimizer. Steps that have ended are forgotten here."""
    for step in list(_running):
        if _is_on_stack(step):
            return True
        _running.pop(step, None)
    return False


_MOST_WALKS = 100
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _is_on_stack(step: _Step) -> bool:
    """Threads run on meanwhile. A function's frame knows its caller even when it has returned; a generator's forgets it when it
    yields: then the walk has ended too early.
    """
    for _ in range(_MOST_WALKS):
        frame = sys._current_frames().get(step.thread)
        last = frame
        while frame is not None:
            if step.is_on(frame):
                return True
            last, frame = frame, frame.f_back
        if last is None or not last.f_code.co_flags & _SUSPENDED:
            return False
    return True  # who knows


def _forget_after_fork() -> None:
    """In a forked child, where only this thread is left: what the parent has in flight is left alone, for ever."""
    global _begun
    _native.leak(dict(_uncaptured))
    _uncaptured.clear()
    _fetched.clear()
    _beginning.clear()
    _begun = threading.Condition()
    for step in [step for step in _running if step.thread != threading.get_ident()]:
        del _running[step]


_install_hooks()
os.register_at_fork(after_in_child=_forget_after_fork)
