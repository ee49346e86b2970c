"""A save that begins while an optimizer's step runs: the fence has passed, so nothing of it may leave lazily."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from choice import in_turn, mostly_slow
from support import DEADLINE_S, assert_same, options
from torch.optim.optimizer import register_optimizer_step_post_hook

import ckpt
from ckpt.fence import step_is_running
from ckpt.saving import inspection


class Interrupted(torch.optim.Optimizer):
    """Something happens in the middle of its step: a signal comes, or another thread runs."""

    def __init__(self, parameters: Any, middle: Callable[[], object] = lambda: None) -> None:
        super().__init__(parameters, {})
        self.middle = middle

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        first, second = self.param_groups[0]["params"]
        first.add_(1)
        self.middle()
        second.add_(1)
        first.add_(1)


def make(middle: Callable[[], object] = lambda: None) -> tuple[list[torch.nn.Parameter], Interrupted]:
    weights = [torch.nn.Parameter(torch.zeros(300_000)) for _ in range(2)]
    optimizer = Interrupted(weights)
    optimizer.step()  # from now on it is known
    optimizer.middle = middle
    assert not step_is_running()
    return weights, optimizer


class Saves:
    """`begin` saves the weights as they are, behind slow storage."""

    def __init__(self, directory: Path, native: Any, weights: list[torch.nn.Parameter], lazy: Any = None) -> None:
        self.directory, self.weights, self.lazy = directory, weights, lazy
        self.made: list[tuple[ckpt.PendingSave, list[torch.Tensor]]] = []
        native.set_fault("pwritev", delay_s=0.1)

    def begin(self, *_: Any) -> None:
        expected = [weight.detach().clone() for weight in self.weights]
        path = self.directory / f"{len(self.made)}.pt"
        self.made.append((ckpt.save([w.detach() for w in self.weights], path, lazy=self.lazy, options=options()), expected))

    def check(self, count: int) -> None:
        assert len(self.made) == count
        for pending, expected in self.made:
            assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))


@contextlib.contextmanager
def on_signal(handler: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def skipping_where_the_compiler_fails() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        major, minor = map(int, torch.__version__.split(".")[:2])
        if type(error).__name__ == "InternalTorchDynamoError" and (major, minor) < (2, 13):
            pytest.skip(f"the compiler of torch {torch.__version__} looks into a signal's handler, and fails there")
        raise


@pytest.mark.parametrize("lazy", [None, True, "optimizer"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_signal_handler_saves_in_the_middle_of_a_step(compiled: bool, lazy: Any, native: Any, tmp_path: Path) -> None:
    weights, optimizer = make(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    saves = Saves(tmp_path, native, weights, optimizer if lazy == "optimizer" else lazy)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    with on_signal(saves.begin), skipping_where_the_compiler_fails():
        step()
        step()
    saves.check(2)
    assert all(pending.stats.bytes_copied_in_save > 2_000_000 for pending, _ in saves.made)


def test_another_thread_saves_in_the_middle_of_a_step(native: Any, tmp_path: Path) -> None:
    def save_elsewhere() -> None:
        thread = threading.Thread(target=saves.begin)
        thread.start()
        thread.join()

    weights, optimizer = make(save_elsewhere)
    saves = Saves(tmp_path, native, weights)
    optimizer.step()
    saves.check(1)


def test_a_step_on_another_thread_of_another_optimizer(native: Any, tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()
    weights, _owner = make()
    _, other = make(lambda: (inside.set(), go_on.wait(DEADLINE_S)))
    saves = Saves(tmp_path, native, weights)
    thread = threading.Thread(target=other.step)
    thread.start()
    assert inside.wait(DEADLINE_S)
    saves.begin()
    assert saves.made[0][0].captured
    go_on.set()
    thread.join()
    for weight in weights:
        weight.data.add_(7)  # nothing is lazy: this needs no fence
    saves.check(1)


def test_an_optimizer_inside_a_step_of_another(native: Any, tmp_path: Path) -> None:
    weights, inner = make()
    _, outer = make(lambda: (inner.step(), saves.begin()))
    saves = Saves(tmp_path, native, weights)
    outer.step()
    for weight in weights:
        weight.data.add_(7)
    saves.check(1)


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise ZeroDivisionError


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_step_that_raises_does_not_make_everything_eager(compiled: bool, native: Any, tmp_path: Path) -> None:
    weights, optimizer = make()
    failing = Failing([torch.nn.Parameter(torch.zeros(3))])
    step = torch.compile(failing.step, backend="eager") if compiled else failing.step
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            step()
    saves = Saves(tmp_path, native, weights)
    saves.begin()
    assert not saves.made[0][0].captured, "it is lazy again"
    optimizer.step()
    saves.check(1)
    assert not step_is_running() and inspection.running_steps() == 0


def test_a_step_that_raised_on_a_thread_that_is_gone(native: Any, tmp_path: Path) -> None:
    failing = Failing([torch.nn.Parameter(torch.zeros(3))])

    def fail() -> None:
        with contextlib.suppress(ZeroDivisionError):
            failing.step()

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert inspection.running_steps()
    assert not step_is_running() and inspection.running_steps() == 0


def test_a_save_from_the_closure_of_a_step(native: Any, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(300_000))
    optimizer = torch.optim.LBFGS([weight], max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        saves.begin()
        loss = (weight - 3).square().sum()
        loss.backward()
        return loss

    saves = Saves(tmp_path, native, [weight])
    optimizer.step(closure)
    optimizer.step(closure)
    saves.check(len(saves.made))
    assert len(saves.made) > 3


# ---- steps within steps ----------------------------------------------------------------------------------------------


class Meeting:
    """The step waits here until a save of another thread has begun."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(DEADLINE_S)


def write_a_little(parameters: list[torch.nn.Parameter]) -> None:
    """As clipping does: too little for a witness, and no version counts it."""
    for parameter in parameters:
        parameter.data[555_555] = -1.0


class Clipped(torch.optim.SGD):
    """Writes behind the step that it inherits, whose hooks fire if there has ever been a plain SGD."""

    meeting: Meeting | None = None

    def update(self, closure: Any) -> None:
        super().step(closure)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.update(closure)
        if self.meeting is not None:
            self.meeting()
            write_a_little(self.param_groups[0]["params"])


class Recovering(Clipped):
    """A step within this one raises."""

    def update(self, closure: Any) -> None:
        def fail() -> float:
            raise ZeroDivisionError

        with contextlib.suppress(ZeroDivisionError):
            super().update(fail)


class Repeating(Recovering):
    """Several steps within this one; some raise."""

    def update(self, closure: Any) -> None:
        for _ in range(2):
            super().update(closure)
            Clipped.update(self, closure)


class Reentrant(Clipped):
    """Its step takes one of its own, all the way."""

    def update(self, closure: Any) -> None:
        if self.meeting is not None:
            meeting, self.meeting = self.meeting, None
            self.step()
            self.meeting = meeting


class Wrapper(torch.optim.Optimizer):
    """As torch's PostLocalSGDOptimizer: never initialised, so no hook knows of it; it writes behind the other's step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optim = inner
        self.param_groups = inner.param_groups
        self.meeting: Meeting | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optim.step()
        if self.meeting is not None:
            self.meeting()
            write_a_little(self.param_groups[0]["params"])


NESTED: dict[str, Callable[[Any], Any]] = {
    "inherited": lambda weights: Clipped(weights, lr=0.1),
    "raising": lambda weights: Recovering(weights, lr=0.1),
    "repeating": lambda weights: Repeating(weights, lr=0.1),
    "reentrant": lambda weights: Reentrant(weights, lr=0.1),
    "wrapped": lambda weights: Wrapper(torch.optim.SGD(weights, lr=0.1)),
    "wrapped_twice": lambda weights: Wrapper(Wrapper(Clipped(weights, lr=0.1))),
}


def nested(kind: str) -> tuple[list[torch.nn.Parameter], Any]:
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # now SGD.step has hooks
    weights = [torch.nn.Parameter(torch.rand(1_000_000)) for _ in range(2)]
    optimizer = NESTED[kind](weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not step_is_running()
    return weights, optimizer


@pytest.mark.parametrize(("kind", "raises"), mostly_slow(product(NESTED, (False, True)), in_turn(NESTED)))
def test_another_thread_saves_behind_a_step_within_a_step(kind: str, raises: bool, native: Any, tmp_path: Path) -> None:
    weights, optimizer = nested(kind)
    optimizer.meeting = meeting = Meeting()
    saves = Saves(tmp_path, native, weights)

    def step() -> None:
        with contextlib.suppress(ZeroDivisionError):
            optimizer.step()
            if raises:
                raise ZeroDivisionError

    thread = threading.Thread(target=step)
    thread.start()
    assert meeting.reached.wait(DEADLINE_S)
    assert step_is_running()
    saves.begin()
    meeting.go_on.set()
    thread.join()
    saves.check(1)
    assert not step_is_running() and inspection.running_steps() == 0
    optimizer.meeting = None
    saves.begin()
    assert not saves.made[1][0].captured, "it is lazy again"
    optimizer.step()
    saves.check(2)


@pytest.mark.parametrize("kind", NESTED)
def test_a_signal_handler_saves_behind_a_step_within_a_step(kind: str, native: Any, tmp_path: Path) -> None:
    weights, optimizer = nested(kind)
    saves = Saves(tmp_path, native, weights)
    optimizer.meeting = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    with on_signal(saves.begin):
        optimizer.step()
        optimizer.step()
    saves.check(2)


def test_a_hook_behind_ours_writes(native: Any, tmp_path: Path) -> None:
    """The step lasts until the last hook behind it has run."""
    weights, optimizer = nested("inherited")
    saves, meeting = Saves(tmp_path, native, weights), Meeting()
    hook = register_optimizer_step_post_hook(lambda *_: (meeting(), write_a_little(weights))[1])
    try:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        assert meeting.reached.wait(DEADLINE_S)
        saves.begin()
        meeting.go_on.set()
        thread.join()
    finally:
        hook.remove()
    saves.check(1)
    assert not step_is_running()


@pytest.mark.parametrize("saves", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", NESTED)
def test_saves_at_random_moments_of_steps_within_steps(kind: str, saves: int, native: Any, tmp_path: Path) -> None:
    weights, optimizer = nested(kind)
    choose, end = random.Random(kind), threading.Event()
    optimizer.meeting = lambda: time.sleep(choose.uniform(0, 0.003))

    def train() -> None:
        while not end.is_set():
            optimizer.step()
            time.sleep(choose.uniform(0, 0.003))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(saves):
            native.set_fault("pwritev", delay_s=choose.choice([0.0, 0.001, 0.003]))
            time.sleep(choose.uniform(0, 0.005))
            pending = ckpt.save(weights, tmp_path / "x.pt", options=options(arena_bytes="16MiB"))
            ckpt.load(pending.result(DEADLINE_S))
    finally:
        end.set()
        thread.join()


def test_steps_that_raise_are_not_remembered() -> None:
    failing = Failing([torch.nn.Parameter(torch.zeros(3))])
    assert not step_is_running()
    for _ in range(50):
        with pytest.raises(ZeroDivisionError):
            failing.step()
    assert inspection.running_steps() == 1
    assert not step_is_running() and inspection.running_steps() == 0


def test_many_optimizers_are_not_remembered() -> None:
    """As where each parameter has one of its own, and steps it during the backward."""
    made = [make()[1] for _ in range(50)]
    assert not step_is_running()
    for optimizer in made:
        optimizer.step()
    assert inspection.running_steps() == 1


# ---- saves that are beginning ----------------------------------------------------------------------------------------


class Blocking:
    """Pickling it waits: the save that it is part of has asked what is lazy, and has not begun to write."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __reduce__(self) -> Any:
        self.reached.set()
        assert self.go_on.wait(DEADLINE_S)
        return int, (7,)


@pytest.mark.parametrize("fence", ["step", "by_hand"])
def test_a_fence_waits_for_a_save_that_is_beginning_on_another_thread(fence: str, native: Any, tmp_path: Path) -> None:
    weights, optimizer = make()
    blocking, ended = Blocking(), threading.Event()
    expected = [weight.detach().clone() for weight in weights]
    made: list[ckpt.PendingSave] = []

    def save() -> None:
        made.append(ckpt.save([blocking, *[w.detach() for w in weights]], tmp_path / "x.pt", options=options()))

    def write() -> None:
        if fence == "step":
            optimizer.step()
        else:
            ckpt.fence()
            for weight in weights:
                weight.data.add_(1)
        ended.set()

    native.set_fault("pwritev", delay_s=0.1)
    saver = threading.Thread(target=save)
    saver.start()
    assert blocking.reached.wait(DEADLINE_S)
    writer = threading.Thread(target=write)
    writer.start()
    assert not ended.wait(0.3), "the fence has not waited"
    blocking.go_on.set()
    saver.join()
    writer.join()
    assert ended.is_set() and inspection.beginning() == 0
    assert_same([7, *expected], ckpt.load(made[0].result(DEADLINE_S), weights_only=False))


def test_a_save_that_cannot_begin_holds_up_nobody(tmp_path: Path) -> None:
    class Unpicklable:
        def __reduce__(self) -> Any:
            raise ZeroDivisionError

    _, optimizer = make()
    with pytest.raises(ZeroDivisionError):
        ckpt.save([Unpicklable()], tmp_path / "x.pt", options=options())
    assert inspection.beginning() == 0
    threading.Thread(target=optimizer.step).start()
    optimizer.step()


def test_a_step_out_of_what_is_being_pickled_does_not_wait_for_itself(tmp_path: Path) -> None:
    _, optimizer = make()

    class Stepping:
        def __reduce__(self) -> Any:
            optimizer.step()
            return int, (7,)

    pending = ckpt.save([Stepping()], tmp_path / "x.pt", options=options())
    assert ckpt.load(pending.result(DEADLINE_S), weights_only=False) == [7]
