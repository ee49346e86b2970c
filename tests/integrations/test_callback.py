"""The callback for plain PyTorch loops, on one process: what it saves, when, and what a resumed run computes."""

from __future__ import annotations

import datetime
import json
import logging
import os
import random
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nursery import Child, Nursery, script, shared_nursery
from places import TESTS
from support import DEADLINE_S, assert_same, options, wait_until
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import ckpt
from ckpt.integrations import torch as callbacks
from ckpt.integrations.torch import CheckpointCallback, Preempted
from ckpt.integrations.torch.random_state import rng_state, set_rng_state

SCRIPT = TESTS / "dist" / "ddp_training.py"
STEPS = 60


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Setup:
    def __init__(self) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)

    def callback(self, directory: Path, **arguments: Any) -> CheckpointCallback:
        given = {"model": self.model, "optimizer": self.optimizer, "options": options()}
        return CheckpointCallback(directory, **(given | arguments))


def copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(item) for item in state] if isinstance(state, list) else state


def assert_equal(expected: Any, found: Any) -> None:
    assert_same(copied(expected), copied(found))


# ---- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with shared_nursery(optimizer=True) as made:
        yield made


def start(nursery: Nursery, where: Path, name: str, *more: str) -> Child:
    arguments = [f"--directory={where / 'saved'}", f"--events={where / name}", f"--steps={STEPS}", *more]
    return nursery.start(script(SCRIPT, *arguments))


def events(log: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if kind in (None, record["event"])]


def run(nursery: Nursery, where: Path, name: str, *more: str) -> list[dict[str, Any]]:
    done = start(nursery, where, name, *more).wait(DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return events(where / f"{name}.0")


@pytest.fixture(scope="module")
def reference(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the uninterrupted run computed, by step. It saves now and then, which must change nothing."""
    log = run(nursery, tmp_path_factory.mktemp("reference"), "log", "--every=7")
    return {event["step"]: event for event in log if "step" in event}


def interrupt(nursery: Nursery, where: Path, after: int, number: signal.Signals, *more: str) -> int:
    """Sends the signal once so many steps are done; returns the exit code."""
    child, log = start(nursery, where, "interrupted", "--pause=0.03", *more), where / "interrupted.0"
    try:
        wait_until(lambda: len(events(log, "step")) >= after or child.ends_within(0), what="progress")
        child.signal(number)
    finally:
        ended = child.wait(DEADLINE_S)
    assert ended.returncode != 0, f"it ended before the signal came: {ended.stderr}"
    return ended.returncode


def assert_same_curve(found: list[dict[str, Any]], reference: dict[int, dict[str, Any]]) -> None:
    assert [event["step"] for event in found] == list(range(found[0]["step"], found[-1]["step"] + 1))
    for event in found:
        expected = reference[event["step"]]
        assert {name: event[name] for name in ("loss", "same", "buffers")} == {
            name: expected[name] for name in ("loss", "same", "buffers")
        }


@pytest.mark.parametrize(
    "more",
    [pytest.param((), id="plain"), pytest.param(("--compiled",), id="resumed-compiled", marks=pytest.mark.slow)],
)
def test_killed_and_resumed_computes_the_same(
    more: tuple[str, ...], nursery: Nursery, reference: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    assert interrupt(nursery, tmp_path, 11, signal.SIGKILL) == -signal.SIGKILL
    killed = events(tmp_path / "interrupted.0", "step")
    resumed = run(nursery, tmp_path, "resumed", *more)
    start, end = resumed[0]["step"], killed[-1]["step"]
    assert 1 <= start <= end + 1
    assert resumed[0]["same"] == reference[start]["same"]
    assert resumed[0]["buffers"] == reference[start]["buffers"]
    assert_same_curve(killed, reference)
    assert_same_curve([event for event in resumed if event["event"] == "step"], reference)
    assert resumed[-2]["step"] == STEPS


def test_sigterm_saves_the_step_and_ends(nursery: Nursery, reference: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    assert interrupt(nursery, tmp_path, 5, signal.SIGTERM, "--preemption", "--every=100000") == 143
    log = events(tmp_path / "interrupted.0")
    assert log[-1]["event"] == "preempted"
    assert f"{log[-1]['step']} steps are done and saved" in log[-2]["text"]
    resumed = run(nursery, tmp_path, "resumed")
    assert resumed[0]["step"] == log[-1]["step"]
    assert_same_curve([event for event in resumed if event["event"] == "step"], reference)


# ---- what is saved ---------------------------------------------------------------------------------------------------


def test_nothing_to_resume(tmp_path: Path) -> None:
    with Setup().callback(tmp_path) as callback:
        assert callback.resume() == 0
    assert callback.checkpointer.directory == tmp_path


def test_several_of_each(tmp_path: Path) -> None:
    def parts(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        models = {"generator": nn.Linear(64, 64), "critic": nn.Linear(64, 2)}
        optimizers = {name: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for name, model in models.items()}
        for model, optimizer in zip(models.values(), optimizers.values(), strict=True):
            train(model, optimizer)
        schedulers = {name: torch.optim.lr_scheduler.StepLR(each, seed) for name, each in optimizers.items()}
        return {"model": models, "optimizer": optimizers, "scheduler": schedulers}

    saved, loaded = parts(1), parts(2)
    with CheckpointCallback(tmp_path, **saved, options=options()) as callback:
        assert callback.save(1).result(DEADLINE_S) == tmp_path / "step-000000000001"
    with CheckpointCallback(tmp_path, **loaded, options=options()) as callback:
        assert callback.resume() == 1
    for kind in saved:
        for name in saved[kind]:
            assert_equal(saved[kind][name].state_dict(), loaded[kind][name].state_dict())


def test_other_than_optimizers_may_write_right_after_save(tmp_path: Path) -> None:
    setup = Setup()
    ema, target = AveragedModel(setup.model), make_model()
    train(setup.model, setup.optimizer)
    with setup.callback(tmp_path, model={"online": setup.model, "target": target}, extra={"ema": ema}) as callback:
        expected = [copied(part.state_dict()) for part in (setup.model, setup.optimizer, ema, target)]
        pending = callback.save(1)
        for parameter in [*ema.parameters(), *target.parameters()]:
            parameter.data.zero_()
        for buffer in setup.model.buffers():
            buffer.zero_()
        train(setup.model, setup.optimizer)
        pending.result(DEADLINE_S)
        assert callback.resume() == 1
    found = [copied(part.state_dict()) for part in (setup.model, setup.optimizer, ema, target)]
    assert_same(expected, found)


@pytest.mark.parametrize("wrapped", ["compiled", "compiled inside", "data parallel", "compiled data parallel"])
def test_modules_are_saved_bare(wrapped: str, tmp_path: Path) -> None:
    setup, other = Setup(), Setup()
    train(setup.model, setup.optimizer)

    def wrap(model: nn.Module) -> nn.Module:
        if wrapped == "compiled inside":
            model[1] = torch.compile(model[1], backend="eager")  # type: ignore[index, operator]
        if "data parallel" in wrapped:
            model = nn.DataParallel(model)
        return torch.compile(model, backend="eager") if wrapped.startswith("compiled") else model  # type: ignore[return-value]

    expected = copied(setup.model.state_dict())
    with setup.callback(tmp_path, model=wrap(setup.model)) as callback:
        callback.save(1)
    with other.callback(tmp_path) as callback:
        assert callback.resume() == 1
        assert_equal(expected, other.model.state_dict())
    again = make_model()
    with other.callback(tmp_path, model=wrap(again)) as callback:
        assert callback.resume() == 1
    assert_equal(list(expected.values()), list(again.state_dict().values()))


def test_random_numbers_go_on() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]

    random.gauss(0, 1), np.random.normal()  # both keep the second of a pair
    state = rng_state()
    expected = draw()
    draw()
    set_rng_state(state)
    assert draw() == expected


@pytest.mark.parametrize(
    ("devices", "current", "expected"),
    [(2, 1, {0: "a", 1: "b"}), (2, 0, {0: "b"}), (1, 0, {0: "b"}), (0, 0, {})],
    ids=["as they were", "another device", "fewer devices", "none"],
)
def test_random_numbers_of_devices(
    devices: int, current: int, expected: dict[int, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: dict[int, str] = {}
    cuda = {
        "is_available": lambda: devices > 0,
        "device_count": lambda: devices,
        "current_device": lambda: current,
        "set_rng_state_all": lambda states: taken.update(enumerate(states)),
        "set_rng_state": lambda state, device: taken.update({device: state}),
    }
    state = rng_state()
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    set_rng_state(state | {"cuda": ["a", "b"], "cuda_device": 1})
    assert taken == expected
    assert ("no CUDA device here" in caplog.text) == (devices == 0)


def test_numpy_that_nobody_uses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    assert sorted(rng_state()) == ["python", "torch"]


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_messages_name_the_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()
    train(setup.model, setup.optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(setup.optimizer, 3)
    with setup.callback(tmp_path, model={"a": setup.model}) as callback:
        callback.save(7)
    with setup.callback(tmp_path, model={"a": setup.model}, scheduler=schedule) as callback:
        with pytest.raises(ckpt.CheckpointError, match=r"checkpoint 7 in '.*' does not fit: it holds no scheduler\. Give"):
            callback.resume()
        assert callback.resume(strict=False) == 7
        assert "it holds no scheduler" in caplog.text
    headless = setup.model[:2]
    with setup.callback(tmp_path, model={"a": headless}) as callback:
        assert callback.resume(strict=False) == 7
        assert "'model/a' of checkpoint 7: only one side has 2.weight, 2.bias" in caplog.text
    with (
        setup.callback(tmp_path, model={"b": setup.model}) as callback,
        pytest.raises(ckpt.CheckpointError, match="it holds no model/b; it holds model/a, which the callback was not given"),
    ):
        callback.resume()
    narrow = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))
    with (
        setup.callback(tmp_path, model={"a": narrow}) as callback,
        pytest.raises(ckpt.CheckpointError, match=r"(?s)'model/a' of checkpoint 7 does not fit: .*size mismatch for 0\.weight"),
    ):
        callback.resume()
    fewer = torch.optim.Adam([setup.model[0].weight])
    with (
        setup.callback(tmp_path, model={"a": setup.model}, optimizer=fewer) as callback,
        pytest.raises(ckpt.CheckpointError, match=r"'optimizer' of checkpoint 7 does not fit: .*parameter group"),
    ):
        callback.resume()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"data": [1, 2]}, TypeError, "data must have state_dict.* list has not: give a sampler of torch"),
        ({"data": DataLoader(range(4))}, TypeError, r"DataLoader has not: give its sampler, data=loader\.sampler"),
        ({"data": DataLoader(range(4), batch_size=None)}, TypeError, r"data=loader\.sampler"),
        ({"data": DataLoader(range(4), batch_sampler=[[1]])}, TypeError, r"data=loader\.batch_sampler"),
        ({"scheduler": {"a": nn.Linear}}, TypeError, "scheduler/a must have"),
        ({"extra": nn.Linear(1, 1)}, TypeError, "extra must be a dict"),
        ({"extra": {"a/b": nn.Linear(1, 1)}}, ValueError, "extra= takes names"),
        ({"every": 0}, ValueError, "every must be at least 1 step, not 0"),
        ({"every": True}, TypeError, "every must be a number of steps"),
        ({"every": "soon"}, ValueError, "every must be a duration"),
        ({"every": "10 steps"}, ValueError, r"not '10 steps'. every takes a number of steps \(100\), .*'10min'.*'auto'"),
        ({"every": "0s"}, ValueError, "every must be a positive duration"),
        ({"every": 1.5}, TypeError, "every must be a number of steps"),
        ({"preemption": "never"}, ValueError, "preemption must be a duration"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=text):
        Setup().callback(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def previous() -> Iterator[list[int]]:
    """A handler of SIGTERM that was there before; what it has received."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_sigterm_reaches_the_handler_before_after_the_save(previous: list[int], tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    setup = Setup()
    with pytest.raises(Preempted) as raised, setup.callback(tmp_path, every=1000, preemption="30s") as callback:
        train(setup.model, setup.optimizer)
        assert callback.step(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert previous == []
        train(setup.model, setup.optimizer)
        callback.step(2)
        raise AssertionError("step() must end training")
    assert (raised.value.code, raised.value.step) == (143, 2)
    assert previous == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is handler
    with setup.callback(tmp_path) as callback:
        assert callback.resume() == 2


def test_sigterm_after_the_last_step_ends_with_close(previous: list[int], tmp_path: Path) -> None:
    setup = Setup()
    with pytest.raises(Preempted) as raised, setup.callback(tmp_path, preemption=30) as callback:
        pending = callback.step(1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert pending is not None and pending.done() and raised.value.step == 1
    assert previous == [signal.SIGTERM]


def test_the_grace_time_ends(previous: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    setup = Setup()
    waits = []

    def never(self: ckpt.PendingSave, timeout: float | None = None) -> Path:
        waits.append(timeout)
        raise ckpt.CheckpointError("not yet")

    with pytest.raises(Preempted), setup.callback(tmp_path, preemption=datetime.timedelta(seconds=3)) as callback:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(ckpt.PendingSave, "result", never)
        callback.step(1)
    assert len(waits) == 1 and 2.0 < waits[0] <= 3.0
    assert "1 steps are done, but their checkpoint is not durable: not yet" in caplog.text


def test_without_a_signal_nothing_happens(previous: list[int], tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    setup = Setup()
    callback = setup.callback(tmp_path, preemption=True)
    assert signal.getsignal(signal.SIGTERM) is not handler
    callback.step(1)
    callback.close()
    callback.close()
    assert signal.getsignal(signal.SIGTERM) is handler and previous == []


def test_a_handler_that_came_later_stays(previous: list[int], tmp_path: Path) -> None:
    callback = Setup().callback(tmp_path, preemption=True)
    later = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGTERM, later)
    callback.close()
    assert signal.getsignal(signal.SIGTERM) is later


def test_preemption_outside_the_main_thread_is_refused(tmp_path: Path, leaks_nothing: Any) -> None:
    errors: list[BaseException] = []

    def make() -> None:
        try:
            Setup().callback(tmp_path, preemption=True)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "only the main thread" in str(errors[0])


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_leaving_drains_and_saves_nothing_new(tmp_path: Path) -> None:
    setup = Setup()
    saved = []
    with setup.callback(tmp_path, every=2) as callback:
        for step in (1, 2, 3):
            train(setup.model, setup.optimizer)
            saved.append(callback.step(step))
    assert saved[0] is None and saved[2] is None
    assert saved[1] is not None and saved[1].done() and saved[1].step == 2
    with setup.callback(tmp_path) as callback:
        assert callback.resume() == 2


def test_an_error_in_the_loop_is_not_hidden(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()
    with pytest.raises(ZeroDivisionError), setup.callback(tmp_path) as callback:
        pending = callback.save(1)
        raise ZeroDivisionError
    assert pending.done() and pending.exception() is None

    def broken(self: Any) -> None:
        raise ckpt.CheckpointError("the disk is gone")

    with pytest.raises(ZeroDivisionError), setup.callback(tmp_path) as callback:
        close = callback.checkpointer.close
        callback.checkpointer.close = types.MethodType(broken, callback.checkpointer)  # type: ignore[method-assign]
        raise ZeroDivisionError
    close()
    assert "the disk is gone" in caplog.text


def test_public_names() -> None:
    assert callbacks.__all__ == ["Auto", "CheckpointCallback", "Preempted", "Preemption"]
    assert issubclass(Preempted, SystemExit) and logging.getLogger("ckpt").handlers == []
