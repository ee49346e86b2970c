"""What the callback resumes in place, and that all else comes out as if it had loaded a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, options
from test_callback import Setup, assert_equal, copied, make_model, train
from test_load_into import pointers
from torch import nn

import ckpt
from ckpt.integrations.torch import CheckpointCallback, state_parts


def stepped(seed: int) -> Setup:
    setup = Setup()
    torch.manual_seed(seed)
    for _ in range(seed):
        train(setup.model, setup.optimizer)
    return setup


def states(setup: Setup) -> list[Any]:
    return [copied(setup.model.state_dict()), copied(setup.optimizer.state_dict())]


def memory(setup: Setup) -> list[int]:
    moments = [value for state in setup.optimizer.state.values() for value in state.values()]
    return pointers([*setup.model.state_dict().values(), *moments])


def saved(directory: Path, seed: int = 2) -> Setup:
    setup = stepped(seed)
    with setup.callback(directory) as callback:
        callback.save(seed).result(DEADLINE_S)
    return setup


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The tensors of model and optimizer that a checkpoint was read into, by their names."""
    found: list[tuple[Any, ...]] = []
    restore = ckpt.Checkpointer.restore

    def watched(self: ckpt.Checkpointer, *, replicated_into: Any, **how: Any) -> Any:
        here: dict[tuple[Any, ...], torch.Tensor] = {}

        def lend(held: Any) -> dict[tuple[Any, ...], torch.Tensor]:
            here.update(replicated_into(held))
            return here

        restored = restore(self, replicated_into=lend, **how)
        for path, tensor in here.items():
            value: Any = restored.replicated if restored else None
            for key in path:
                value = value[key]
            found.extend([path] if value is tensor else [])
        return restored

    monkeypatch.setattr(ckpt.Checkpointer, "restore", watched)
    return found


def test_model_and_optimizer_stay_where_they_are(tmp_path: Path, lent: list[tuple[Any, ...]]) -> None:
    expected = states(saved(tmp_path))
    setup = stepped(1)
    before = memory(setup)
    with setup.callback(tmp_path) as callback:
        assert callback.resume() == 2
    assert_equal(expected, states(setup))
    assert memory(setup) == before
    parameters = list(setup.model.parameters())
    assert len(lent) == len(setup.model.state_dict()) + 3 * len(parameters)


def test_an_optimizer_without_a_step_takes_up_what_is_read(tmp_path: Path, lent: list[tuple[Any, ...]]) -> None:
    expected = states(saved(tmp_path))
    setup = Setup()
    with setup.callback(tmp_path) as callback:
        assert callback.resume() == 2
    assert_equal(expected, states(setup))
    assert {name for name, *_ in lent} == {"model"}


def test_training_goes_on_the_same(tmp_path: Path) -> None:
    """With what makes states odd: tied weights, a scheduler with a Counter, an average, another dtype."""

    def make(seed: int) -> tuple[dict[str, Any], nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Linear(64, 8).bfloat16().float())
        model[2].weight = model[0].weight
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
        average = torch.optim.swa_utils.AveragedModel(model)
        given = {"model": model, "optimizer": optimizer, "scheduler": schedule, "extra": {"average": average}}
        for _ in range(seed):
            advance(given)
        return given, model, optimizer

    def advance(given: dict[str, Any]) -> None:
        train(given["model"], given["optimizer"])
        given["scheduler"].step()
        given["extra"]["average"].update_parameters(given["model"])

    def ends(given: dict[str, Any]) -> list[Any]:
        parts = [given["model"], given["optimizer"], given["scheduler"], given["extra"]["average"]]
        return [copied(part.state_dict()) for part in parts]

    first, second = make(3)[0], make(1)[0]
    with CheckpointCallback(tmp_path, **first, options=options()) as callback:
        callback.save(3).result(DEADLINE_S)
        advance(first)
        advance(first)
    with CheckpointCallback(tmp_path, **second, options=options()) as callback:
        assert callback.resume() == 3
        advance(second)
        advance(second)
    assert second["model"][2].weight is second["model"][0].weight
    assert_equal(ends(first), ends(second))


def swap(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """As of a module whose weights have changed their names: what is read in place would overwrite one with the other."""
    state["0.bias"], state["1.bias"] = state["1.bias"], state["0.bias"]


class Doubling(nn.Linear):
    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, *rest)


class Own(nn.Sequential):
    def load_state_dict(self, state: Any, *rest: Any, **how: Any) -> Any:
        return super().load_state_dict({key: value + 1 for key, value in state.items()}, *rest, **how)


def patched() -> nn.Module:
    """A method of one module, and not of its class."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    load = model[0]._load_from_state_dict

    def swapping(state: Any, prefix: str, *rest: Any) -> None:
        load({f"{prefix}weight": state[f"{prefix}weight"].t(), f"{prefix}bias": state[f"{prefix}bias"].flip(0)}, prefix, *rest)

    model[0]._load_from_state_dict = swapping  # type: ignore[method-assign]
    return model


def with_hook() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.register_load_state_dict_pre_hook(swap)
    return model


@pytest.mark.parametrize(
    "make",
    [
        with_hook,
        lambda: nn.Sequential(Doubling(64, 64), nn.Linear(64, 64)),
        lambda: Own(nn.Linear(64, 64), nn.Linear(64, 64)),
        patched,
    ],
    ids=["hook", "submodule", "module", "patched"],
)
def test_modules_that_load_in_their_own_way(make: Callable[[], nn.Module], tmp_path: Path, lent: list[tuple[Any, ...]]) -> None:
    first, second, third = make(), make(), make()
    with CheckpointCallback(tmp_path, model=first, options=options()) as callback:
        callback.save(1).result(DEADLINE_S)
    third.load_state_dict(copied(first.state_dict()))
    with CheckpointCallback(tmp_path, model=second, options=options()) as callback:
        assert callback.resume() == 1
    assert_equal(third.state_dict(), second.state_dict())
    assert lent == []


@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
@pytest.mark.parametrize("how", ["tied", "overlapping"])
def test_memory_that_is_shared_only_here(how: str, turned: bool, tmp_path: Path) -> None:
    """The last one stays, as with load_state_dict(), in whatever order the file has them."""

    class Model(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            base = torch.zeros(200)
            self.first = nn.Parameter(base[:100] if shared else torch.ones(100))
            self.last = nn.Parameter(torch.full((100,), 2.0))
            if shared and how == "tied":
                self.last = self.first
            elif shared:
                self.last = nn.Parameter(base[50:150])

        def state_dict(self, *rest: Any, **how: Any) -> Any:
            state = super().state_dict(*rest, **how)
            for key in list(state)[:1] if turned else []:
                state.move_to_end(key)
            return state

    saved, stock, other = Model(False), Model(True), Model(True)
    with CheckpointCallback(tmp_path, model=saved, options=options()) as callback:
        callback.save(1).result(DEADLINE_S)
    stock.load_state_dict(copied(saved.state_dict()))
    with CheckpointCallback(tmp_path, model=other, options=options()) as callback:
        assert callback.resume() == 1
    assert_equal(stock.state_dict(), other.state_dict())


def test_an_optimizer_that_loads_in_its_own_way(tmp_path: Path, lent: list[tuple[Any, ...]]) -> None:
    expected = states(saved(tmp_path))
    setup = stepped(1)

    def clear(optimizer: Any, state: Any) -> Any:
        return state | {"state": {}}

    setup.optimizer.register_load_state_dict_pre_hook(clear)
    with setup.callback(tmp_path) as callback:
        assert callback.resume() == 2
    assert_equal(expected[0], setup.model.state_dict())
    assert not setup.optimizer.state and {name for name, *_ in lent} == {"model"}


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 7))


@pytest.mark.parametrize(
    "misfit",
    [
        {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), 3)},
        {"optimizer": torch.optim.Adam([nn.Parameter(torch.ones(1))])},
        {"extra": {"more": make_model()}},
    ],
    ids=["a part is missing", "other groups", "a module is missing"],
)
def test_nothing_is_filled_if_a_part_does_not_fit(misfit: dict[str, Any], tmp_path: Path, lent: list[tuple[Any, ...]]) -> None:
    saved(tmp_path)
    with (
        stepped(1).callback(tmp_path, **misfit) as callback,
        pytest.raises(ckpt.CheckpointError, match="does not fit"),
    ):
        callback.resume()
    assert lent == []


def test_shapes_and_names_are_looked_at_first() -> None:
    saved_state = make_model().state_dict()
    assert state_parts.lend_memory(narrow(), saved_state, strict=True) is None
    headless = make_model()[:2]
    assert state_parts.lend_memory(headless, saved_state, strict=True) is None
    some = state_parts.lend_memory(headless, saved_state, strict=False)
    assert some is not None and some.keys() == {(key,) for key in headless.state_dict()}
    assert state_parts.lend_memory(make_model(), [], strict=False) is None
    assert state_parts.lend_memory(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), {"state": {}}, strict=True) is None


@pytest.mark.parametrize("groups", [None, 3, [None], [{}], [{"params": 1}], [{"params": [0, 1]}]], ids=str)
def test_states_that_are_none_of_an_optimizer_lend_nothing(groups: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    assert state_parts.lend_memory(optimizer, {"state": {}, "param_groups": groups}, strict=True) is None
    fits = [{"params": [0]}]
    assert state_parts.lend_memory(optimizer, {"state": [], "param_groups": fits}, strict=True) is None
    assert state_parts.lend_memory(optimizer, {"state": {0: 7}, "param_groups": fits}, strict=True) == {}


def test_another_dtype_is_cast(tmp_path: Path, lent: list[tuple[Any, ...]]) -> None:
    expected = saved(tmp_path).model.state_dict()
    other = make_model().double()
    with Setup().callback(tmp_path, model=other) as callback:
        assert callback.resume() == 2
    assert_equal({key: value.to(other.state_dict()[key].dtype) for key, value in expected.items()}, other.state_dict())
    assert lent == [("model", "1.num_batches_tracked")]


def test_a_damaged_checkpoint_is_overwritten_by_the_older(tmp_path: Path) -> None:
    setup = stepped(1)
    with setup.callback(tmp_path) as callback:
        callback.save(1).result(DEADLINE_S)
        expected = states(setup)
        train(setup.model, setup.optimizer)
        path = callback.save(2).result(DEADLINE_S) / "replicated.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert callback.resume() == 1
    assert_equal(expected, states(setup))


def test_buffers_that_no_state_holds_are_not_lent() -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("scratch", torch.zeros(4), persistent=False)
    lent = state_parts.lend_memory(model, {**nn.Linear(4, 4).state_dict(), "scratch": torch.ones(4)}, strict=False)
    assert lent is not None and set(lent) == {("weight",), ("bias",)}
