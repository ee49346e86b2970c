"""The state of optimizers comes back exactly as it was saved: dtypes, groups, and what only one side has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options
from torch import nn

import ckpt
from ckpt import optimizers
from ckpt.errors import MismatchError
from ckpt.integrations.torch import CheckpointCallback


class Mixed(torch.optim.Optimizer):
    """Keeps averages in float32 beside weights in bfloat16, counts in integers, and a mask."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["seen"] = torch.zeros(parameter.shape, dtype=torch.int64)
                    state["parts"] = {"history": [], "wide": torch.zeros(3, dtype=torch.float64)}
                    state["mask"] = torch.zeros(parameter.shape, dtype=torch.bool)
                    state["step"] = torch.tensor(0.0)
                state["average"].mul_(0.9).add_(parameter.grad.float(), alpha=0.123)
                state["seen"] += 2**40 + 1
                state["parts"]["wide"] += 1 / 3
                state["parts"]["history"].append(state["average"][:2].clone())
                state["mask"] |= parameter.grad > 0.5
                state["step"] += 1
                parameter.sub_(state["average"].to(parameter.dtype), alpha=group["lr"])


class Training:
    def __init__(self, seed: int, steps: int = 0, kind: Callable[[Any], torch.optim.Optimizer] = Mixed) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(400, 300).to(torch.bfloat16)
        self.optimizer = kind(self.model.parameters())
        for _ in range(steps):
            self.go()

    def go(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.rand(parameter.shape).to(parameter.dtype)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def target(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}


def by_load_into(saved: Training, other: Training, directory: Path) -> None:
    ckpt.save(saved.state(), directory / "x.pt", options=options()).result(60)
    ckpt.load_into(directory / "x.pt", other.target())


def by_restore_into(saved: Training, other: Training, directory: Path) -> None:
    with ckpt.Checkpointer(directory, options=options()) as checkpointer:
        checkpointer.save(1, saved.state()).result(60)
        assert checkpointer.restore(into=other.target()) is not None


def by_callback(saved: Training, other: Training, directory: Path) -> None:
    with CheckpointCallback(directory, model=saved.model, optimizer=saved.optimizer, options=options()) as callback:
        callback.save(1)
    with CheckpointCallback(directory, model=other.model, optimizer=other.optimizer, options=options()) as callback:
        assert callback.resume() == 1


def by_hand(saved: Training, other: Training, directory: Path) -> None:
    ckpt.save(saved.state(), directory / "x.pt", options=options()).result(60)
    found = ckpt.load(directory / "x.pt")
    other.model.load_state_dict(found["model"])
    optimizers.load_state(other.optimizer, found["optimizer"])


WAYS = {"load_into": by_load_into, "restore_into": by_restore_into, "callback": by_callback, "by_hand": by_hand}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@ways
@pytest.mark.parametrize("stepped", [0, 2], ids=["fresh", "stepped"])
def test_state_of_another_dtype_is_exact(way: Any, stepped: int, tmp_path: Path) -> None:
    saved, other = Training(0, 3), Training(1, stepped)
    expected = copy.deepcopy(saved.state())
    way(saved, other, tmp_path)
    assert_same(expected, copy.deepcopy(other.state()))
    torch.manual_seed(5)
    saved.go()
    torch.manual_seed(5)
    other.go()
    assert_same(copy.deepcopy(saved.state()), copy.deepcopy(other.state()))


def test_torch_itself_rounds_it() -> None:
    """The control: if this fails, torch has changed, and the exact way is torch's own."""
    saved, other = Training(0, 3), Training(1)
    other.optimizer.load_state_dict(saved.optimizer.state_dict())
    state = other.optimizer.state[other.model.weight]
    assert state["average"].dtype is state["seen"].dtype is torch.bfloat16


@ways
def test_state_that_was_rounded_before_follows_the_file(way: Any, tmp_path: Path) -> None:
    saved, other = Training(0, 3), Training(1, 2)
    other.optimizer.load_state_dict(other.optimizer.state_dict())  # now all of it is bfloat16
    expected = copy.deepcopy(saved.state())
    way(saved, other, tmp_path)
    assert_same(expected, copy.deepcopy(other.state()))


@ways
def test_groups_follow_the_file(way: Any, tmp_path: Path) -> None:
    """A scheduler adds keys; another version of torch has others."""
    saved, other = Training(0, 1), Training(1, 1)
    saved.optimizer.param_groups[0] |= {"initial_lr": 0.5, "lr": torch.tensor(0.25), "betas": (0.5, 0.75)}
    other.optimizer.param_groups[0] |= {"lr": 7.0, "only_here": 1}
    way(saved, other, tmp_path)
    group = other.optimizer.param_groups[0]
    assert group["initial_lr"] == 0.5 and group["betas"] == (0.5, 0.75)
    assert isinstance(group["lr"], torch.Tensor) and float(group["lr"]) == 0.25


@ways
@pytest.mark.parametrize("lost", ["saved", "other"])
def test_state_that_parameters_got_or_lost_follows_the_file(way: Any, lost: str, tmp_path: Path) -> None:
    saved, other = Training(0, 1), Training(1, 1)
    training = saved if lost == "saved" else other
    del training.optimizer.state[training.model.bias]
    (saved if lost == "saved" else other).optimizer.state[training.model.weight].pop("mask")
    expected = copy.deepcopy(saved.state())
    way(saved, other, tmp_path)
    assert_same(expected, copy.deepcopy(other.state()))


@ways
def test_hooks_of_the_user_have_the_last_word(way: Any, tmp_path: Path) -> None:
    saved, other = Training(0, 2), Training(1)
    seen: list[torch.dtype] = []

    def before(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [group | {"lr": 0.75} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def after(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            seen.append(state["average"].dtype)
            state["average"] = state["average"].half()

    other.optimizer.register_load_state_dict_pre_hook(before)
    other.optimizer.register_load_state_dict_post_hook(after)
    way(saved, other, tmp_path)
    assert seen == [torch.float32] * 2
    state = other.optimizer.state[other.model.weight]
    assert torch.equal(state["average"], saved.optimizer.state[saved.model.weight]["average"].half())
    assert other.optimizer.param_groups[0]["lr"] == 0.75
    assert len(other.optimizer._optimizer_load_state_dict_pre_hooks) == 1, "none of ours stays"
    assert len(other.optimizer._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_stock_optimizers_load_as_with_torch(kind: Any, tmp_path: Path) -> None:
    saved, other, stock = (Training(seed, 2, lambda parameters: kind(parameters, lr=0.1)) for seed in range(3))
    ckpt.save(saved.state(), tmp_path / "x.pt", options=options()).result(60)
    ckpt.load_into(tmp_path / "x.pt", other.target())
    stock.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert_same(copy.deepcopy(stock.optimizer.state_dict()), copy.deepcopy(other.optimizer.state_dict()))


@pytest.mark.parametrize("way", [by_load_into, by_restore_into, by_callback])
def test_other_numbers_of_parameters_are_refused(way: Any, tmp_path: Path) -> None:
    saved, other = Training(0, 1), Training(1, 1)
    other.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    before = copy.deepcopy(other.state())
    with pytest.raises(ckpt.CheckpointError, match="group"):
        way(saved, other, tmp_path)
    if way is not by_callback:  # whose model may have been loaded by then
        assert_same(before, copy.deepcopy(other.state()))


def test_parameters_are_found_by_their_place_in_the_groups(tmp_path: Path) -> None:
    """Their numbers in the file need not begin with 0."""
    saved, other = Training(0, 2), Training(1, 2)
    state = saved.optimizer.state_dict()
    state["state"] = {number + 10: value for number, value in state["state"].items()}
    state["param_groups"][0]["params"] = [number + 10 for number in state["param_groups"][0]["params"]]
    ckpt.save(state, tmp_path / "x.pt", options=options()).result(60)
    ckpt.load_into(tmp_path / "x.pt", other.optimizer)
    assert_same(copy.deepcopy(saved.optimizer.state_dict()), copy.deepcopy(other.optimizer.state_dict()))


# ---- modules that have no memory yet ---------------------------------------------------------------------------------


def make_lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())


@pytest.mark.parametrize("strict", [True, False])
def test_modules_that_are_lazy_resume(strict: bool, tmp_path: Path) -> None:
    trained, other = make_lazy(), make_lazy()
    trained(torch.randn(5, 3))
    with CheckpointCallback(tmp_path, model=trained, options=options()) as callback:
        callback.save(1)
    with CheckpointCallback(tmp_path, model=other, options=options()) as callback:
        assert callback.resume(strict=strict) == 1
    assert_same(dict(trained.state_dict()), dict(other.state_dict()))


def test_modules_that_are_lazy_get_memory_as_by_load_state_dict(tmp_path: Path) -> None:
    trained, other = make_lazy(), make_lazy()
    trained(torch.randn(5, 3))
    ckpt.save(trained.state_dict(), tmp_path / "x.pt", options=options()).result(60)
    ckpt.load_into(tmp_path / "x.pt", other)
    assert_same(dict(trained.state_dict()), dict(other.state_dict()))


def test_texts_stay_texts(tmp_path: Path) -> None:
    held: dict[str, Any] = {
        "kind": "warm",
        "more": {"names": ["a", "bc"], "pair": ("x", torch.ones(2, dtype=torch.float64)), "few": {"y", "z"}},
        "raw": b"ab",
    }
    for load in (by_load_into, by_restore_into, by_callback):
        saved, other = Training(1, 1), Training(2, 1)
        for number, state in enumerate(saved.optimizer.state.values()):
            state.update(copy.deepcopy(held), number=str(number))
        (directory := tmp_path / load.__name__).mkdir()
        load(saved, other, directory)
        assert_same(saved.optimizer.state_dict(), other.optimizer.state_dict())
    optimizers.load_state(other.optimizer, saved.optimizer.state_dict())
    assert_same(saved.optimizer.state_dict(), other.optimizer.state_dict())


# ---- what load_into() says -------------------------------------------------------------------------------------------


def test_load_into_says_what_was_loaded(tmp_path: Path) -> None:
    ckpt.save({"a": torch.ones(3), "b": {"c": torch.ones(2), "n": 7}, "only": 1}, tmp_path / "x.pt").result(60)
    target = {"a": torch.zeros(3), "b": {"c": torch.zeros(2), "n": 0, "mine": torch.zeros(1)}}
    with pytest.raises(MismatchError, match="strict=False passes over keys"):
        ckpt.load_into(tmp_path / "x.pt", target)
    done = ckpt.load_into(tmp_path / "x.pt", target, strict=False)
    assert sorted(done.loaded) == ["a", "b.c", "b.n"]
    assert done.missing == ["b.mine"] and done.unexpected == ["only"]
    assert target["b"]["n"] == 7 and torch.equal(target["a"], torch.ones(3))  # type: ignore[index]


@pytest.mark.parametrize("target", [{"modle": nn.Linear(2, 2)}, nn.Linear(2, 2), {}], ids=["misspelt", "bare_module", "empty"])
def test_nothing_in_common_is_an_error(target: Any, tmp_path: Path) -> None:
    ckpt.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "x.pt").result(60)
    with pytest.raises(MismatchError, match="no key in common with it: the file has 'model'"):
        ckpt.load_into(tmp_path / "x.pt", target, strict=False)


def test_an_empty_file_fits_an_empty_target(tmp_path: Path) -> None:
    ckpt.save({}, tmp_path / "x.pt").result(60)
    assert ckpt.load_into(tmp_path / "x.pt", {}, strict=False) == ([], [], [])
