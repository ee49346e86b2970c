"""The callback above a Checkpointer that is pretended: when it saves, and what it makes of the states of other ranks."""

from __future__ import annotations

import datetime
import itertools
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckpt
from ckpt.integrations.torch import Auto, CheckpointCallback, when_to_save
from ckpt.integrations.torch.random_state import rng_state
from ckpt.quantities import parse_duration

# ---- when ------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(when_to_save, "now", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class FakeSave:
    """A save that holds up training for `cost_s` at the fence and is durable after `durable_s`."""

    path = Path(__file__)  # there is one

    def exception(self) -> None:
        return None

    def __init__(self, clock: Clock, cost_s: float, durable_s: float) -> None:
        self._clock, self._began, self._durable_s = clock, clock.now, durable_s
        self.stats = ckpt.SaveStats(fence_s=cost_s, started_at=self._began, durable_at=self._began + durable_s)

    def done(self) -> bool:
        return self._clock.now >= self._began + self._durable_s


class FakeCheckpointer:
    """What the callback sees of a Checkpointer; `answer` is what restore() gives to merge=."""

    rank, world_size = 0, 1
    make_save: Callable[[], Any] = lambda: None
    states: list[Any] | None = None
    replicated: Any = None
    agree: Any = None

    def __init__(self, directory: Any, **arguments: Any) -> None:
        self.directory = directory
        self.saved: list[int] = []

    def save(self, step: int, state: Any, *, replicated: Any, sharded: Any, lazy: Any, metrics: Any, frozen: Any) -> Any:
        assert sharded is None, "nothing of these models is"
        self.saved.append(step)
        self.state, self.replicated_state, self.lazy = state, replicated, lazy
        return type(self).make_save()

    def restore(self, *, merge: Any, **arguments: Any) -> Any:
        if self.states is None:
            return None
        return types.SimpleNamespace(step=9, state=merge(self.states), replicated=self.replicated, sharded=None)

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCheckpointer]:
    kind = type("OneFakeCheckpointer", (FakeCheckpointer,), {})
    monkeypatch.setattr(ckpt, "Checkpointer", kind)
    return kind


def saved_steps(fake: type[FakeCheckpointer], clock: Clock, every: Any, steps: int, step_s: float = 1.0) -> list[int]:
    fake.make_save = staticmethod(lambda: FakeSave(clock, 0.0, 0.1))
    with CheckpointCallback("nowhere", model=nn.Linear(1, 1), every=every) as callback:
        start = callback.resume()
        for step in range(start + 1, steps + 1):
            clock.now += step_s
            assert (callback.step(step) is not None) == (step in callback.checkpointer.saved)  # type: ignore[attr-defined]
        return callback.checkpointer.saved  # type: ignore[attr-defined, no-any-return]


def test_every_so_many_steps(fake: type[FakeCheckpointer], clock: Clock) -> None:
    assert saved_steps(fake, clock, 4, 14) == [4, 8, 12]
    assert saved_steps(fake, clock, 1, 3) == [1, 2, 3]
    fake.states, fake.replicated = [{"rng": rng_state()}], {"model": nn.Linear(1, 1).state_dict()}
    assert saved_steps(fake, clock, 4, 14) == [12]  # resumed at 9: the same steps as without


@pytest.mark.parametrize("every", ["5s", "5000ms", datetime.timedelta(seconds=5), "0.08333333min"])
def test_every_so_many_seconds(fake: type[FakeCheckpointer], clock: Clock, every: Any) -> None:
    assert saved_steps(fake, clock, every, 16, step_s=1.0) == [5, 10, 15]
    assert saved_steps(fake, clock, every, 6, step_s=2.0) == [3, 6]


@pytest.mark.parametrize(("mtbf", "overhead", "error"), [("x", 0.1, ValueError), ("1h", 0, ValueError), ("1h", 2, ValueError)])
def test_impossible_auto(mtbf: str, overhead: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        Auto(mtbf, overhead)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10min", 600), ("2h", 7200), ("1.5 d", 129600), ("250MS", 0.25)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "every") == seconds


def auto_steps(fake: type[FakeCheckpointer], clock: Clock, auto: Any, cost_s: float, durable_s: float, steps: int) -> list[int]:
    fake.make_save = staticmethod(lambda: FakeSave(clock, cost_s, durable_s))
    with CheckpointCallback("nowhere", model=nn.Linear(1, 1), every=auto) as callback:
        for step in range(1, steps + 1):
            clock.now += 1.0
            callback.step(step)
        return callback.checkpointer.saved  # type: ignore[attr-defined, no-any-return]


def test_auto_follows_young_and_daly(fake: type[FakeCheckpointer], clock: Clock) -> None:
    # sqrt(2 * 0.5 s * 400 s) = 20 s
    assert auto_steps(fake, clock, Auto("400s", overhead=0.5), 0.5, 1.0, 70) == [1, 21, 41, 61]
    # four times as expensive: twice as rarely
    assert auto_steps(fake, clock, Auto("400s", overhead=0.5), 2.0, 1.0, 90) == [1, 41, 81]
    # sqrt(2 * 0.001 s * 6 h) = 6.57 s
    assert auto_steps(fake, clock, "auto", 0.001, 1.0, 20) == [1, 8, 15]


def test_auto_says_what_it_has_decided_and_again_when_that_has_changed_much(
    fake: type[FakeCheckpointer], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    costs = iter([0.5] * 4 + [3.0] * 20)
    fake.make_save = staticmethod(lambda: FakeSave(clock, next(costs), 1.0))
    caplog.set_level("INFO", "ckpt")
    with CheckpointCallback("nowhere", model=nn.Linear(1, 1), every=Auto("400s", overhead=0.5)) as callback:
        for step in range(1, 400):
            clock.now += 0.5
            callback.step(step)
    told = [record.getMessage() for record in caplog.records if "every='auto'" in record.getMessage()]
    assert len(told) == 2, told
    assert told[0].startswith("every='auto': a save about every 40 steps (20 s): that loses least if something fails each 400s")
    assert "holds training up for 0.5 s, and is durable after 1 s" in told[0]
    assert "every 98 steps (49 s)" in told[1]


def test_auto_keeps_to_the_overhead(fake: type[FakeCheckpointer], clock: Clock) -> None:
    assert auto_steps(fake, clock, Auto("400s", overhead=0.01), 0.5, 1.0, 110) == [1, 51, 101]


def test_auto_waits_until_durable(fake: type[FakeCheckpointer], clock: Clock) -> None:
    assert auto_steps(fake, clock, Auto("1s", overhead=0.5), 0.5, 30.0, 70) == [1, 31, 61]


def test_auto_counts_what_save_itself_costs(fake: type[FakeCheckpointer], clock: Clock) -> None:
    def slow_save() -> FakeSave:
        clock.now += 0.5
        return FakeSave(clock, 0.0, 0.1)

    fake.make_save = staticmethod(slow_save)
    with CheckpointCallback("nowhere", model=nn.Linear(1, 1), every=Auto("400s", overhead=0.5)) as callback:
        for step in range(1, 45):
            clock.now += 1.0
            callback.step(step)
    assert callback.checkpointer.saved == [1, 21, 41]  # type: ignore[attr-defined]


class Ranks:
    """Ranks that take steps one after the other, each with a clock of its own; agree() gives them rank 0's values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: Any, drift: list[float]) -> None:
        self.drift, self.time, self.rank, self.calls = drift, 0.0, 0, [0] * len(drift)
        self._values: list[bytes] = []
        monkeypatch.setattr(when_to_save, "now", lambda: self.time * self.drift[self.rank])
        self.intervals = [when_to_save.make_interval(every, self._agree) for _ in drift]

    def _agree(self, value: bytes) -> bytes:
        if self.rank == 0:
            self._values.append(value)
        self.calls[self.rank] += 1
        return self._values[self.calls[self.rank] - 1]

    def step(self, step: int, step_s: float, save: Callable[[], Any]) -> bool:
        """All ranks take the step; whether they save, which must be the same for all."""
        self.time += step_s
        due = []
        for rank, interval in enumerate(self.intervals):
            self.rank = rank
            due.append(interval.is_due(step))
            if due[-1]:
                interval.note_save(step, save(), 0.0)
        assert len(set(due)) == 1
        return due[0]


@pytest.mark.parametrize("every", ["30s", Auto("450s", overhead=0.5)], ids=["30s", "auto"])
def test_ranks_with_other_clocks_save_the_same_steps(every: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, every, [1.0, 1.7, 0.2])
    clock: Any = types.SimpleNamespace(now=0.0)

    def save() -> FakeSave:
        clock.now = ranks.time
        return FakeSave(clock, 1.0 + ranks.rank, 2.0)

    rng = random.Random(1)
    saved = []
    for step in range(1, 4001):
        clock.now = ranks.time
        if ranks.step(step, rng.uniform(0.05, 0.15), save):
            saved.append(ranks.time)
    gaps = [b - a for a, b in itertools.pairwise(saved[1:])]
    assert len(saved) >= 11
    assert min(gaps) > 28.5 and max(gaps) < 31.5  # rank 0's clock is right
    assert ranks.calls[0] == ranks.calls[1] == ranks.calls[2] <= 4 * len(saved)


def test_looks_follow_steps_that_get_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, "10s", [1.0, 1.0])
    saved = [step for step in range(1, 200) if ranks.step(step, 0.1 if step <= 120 else 5.0, lambda: None)]
    assert saved[0] in (100, 101)
    late = [step for step in saved if step > 140]
    assert {b - a for a, b in itertools.pairwise(late)} <= {2, 3}


# ---- another number of ranks -----------------------------------------------------------------------------------------


class Position:
    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "order": torch.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def rank_states(positions: list[Any]) -> list[dict[str, Any]]:
    states = []
    for rank, position in enumerate(positions):
        random.seed(rank)
        torch.manual_seed(rank)
        buffers = {
            "running_mean": torch.full((2,), float(rank)),
            "running_var": torch.ones(2),
            "num_batches_tracked": torch.tensor(3),
        }
        states.append({"rng": rng_state(), "data": Position(position).state_dict(), "buffers/model": buffers})
    return states


@pytest.fixture
def old_ranks(fake: type[FakeCheckpointer]) -> type[FakeCheckpointer]:
    """A checkpoint of three ranks, to be resumed by rank 4 of 5."""
    fake.rank, fake.world_size = 4, 5
    fake.replicated = {"model": {"weight": torch.full((2,), 5.0), "bias": torch.zeros(2)}}
    return fake


def test_random_numbers_and_buffers_of_other_ranks(old_ranks: type[FakeCheckpointer], caplog: pytest.LogCaptureFixture) -> None:
    old_ranks.states = rank_states([7, 7, 7])
    model, position = nn.BatchNorm1d(2), Position()
    with CheckpointCallback("nowhere", model=model, data=position) as callback:
        assert callback.resume() == 9
    assert random.random() == random.Random(1).random()  # 4 % 3
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(1)))
    assert model.running_mean is not None and model.running_mean.tolist() == [0.0, 0.0]
    assert model.weight.tolist() == [5.0, 5.0]
    assert position.value == 7
    assert "saved by 3 rank(s), now there are 5: rank 4 goes on with the random numbers of rank 1" in caplog.text
    assert "give merge_data=" in caplog.text


def test_positions_that_differ_are_dropped(old_ranks: type[FakeCheckpointer], caplog: pytest.LogCaptureFixture) -> None:
    old_ranks.states = rank_states([7, 8, 7])
    position = Position(-1)
    with CheckpointCallback("nowhere", model=nn.BatchNorm1d(2), data=position) as callback:
        assert callback.resume() == 9
    assert position.value == -1
    assert "the positions in the data differ between the 3 ranks that saved" in caplog.text


def test_positions_are_merged(old_ranks: type[FakeCheckpointer]) -> None:
    def merge_data(states: list[Any]) -> Any:
        return {"value": [state["value"] for state in states]}

    old_ranks.states = rank_states([7, 8, 9])
    position = Position()
    with CheckpointCallback("nowhere", model=nn.BatchNorm1d(2), data=position, merge_data=merge_data) as callback:
        callback.resume()
    assert position.value == [7, 8, 9]
    for state in old_ranks.states:
        state["data/x"] = state.pop("data")
    with CheckpointCallback(
        "nowhere",
        model=nn.BatchNorm1d(2),
        data={"x": position},
        merge_data=lambda states: {"x": {"value": [state["x"]["value"] + 1 for state in states]}},
    ) as callback:
        callback.resume()
    assert position.value == [8, 9, 10]


def test_only_what_optimizers_write_leaves_lazily(fake: type[FakeCheckpointer]) -> None:
    model, target = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    models = {"online": model, "target": target}
    for lazy in (None, model):  # the latter: who knows that nothing else writes to frozen weights may say so
        with CheckpointCallback("nowhere", model=models, optimizer=optimizer, lazy=lazy) as callback:
            callback.save(1)
        expected = [optimizer] if lazy is None else [optimizer, lazy]
        assert callback.checkpointer.lazy == expected  # type: ignore[attr-defined]


def test_buffers_are_kept_by_rank_under_several(fake: type[FakeCheckpointer]) -> None:
    fake.world_size = 2
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with CheckpointCallback("nowhere", model=model, extra={"ema": AveragedModel(model)}) as callback:
        callback.save(1)
    found: Any = callback.checkpointer
    parameters = {name for name, _ in model.named_parameters()}
    assert found.replicated_state["model"].keys() == parameters
    assert found.state["buffers/model"].keys() == model.state_dict().keys() - parameters
    assert "n_averaged" in found.state["buffers/extra/ema"]
    assert set(found.state) == {"rng", "buffers/model", "buffers/extra/ema"}
