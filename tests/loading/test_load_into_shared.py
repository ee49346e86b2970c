"""load_into() and restore(into=) into memory that several names share, here and in the file, each in its own way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same
from test_load_into import zeros_like
from test_load_into_modules import SEVERAL, everything, load_by
from torch import nn

import ckpt
from ckpt.errors import MismatchError

AdamW = torch.optim.AdamW


class Names(nn.Module):
    """Parameters, in the order in which they are loaded."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))


def tied() -> Names:
    one = nn.Parameter(torch.zeros(40))
    return Names(a=one, b=one, c=nn.Parameter(torch.zeros(40)))


def overlapping() -> Names:
    base = torch.zeros(60)
    return Names(a=base.as_strided((40,), (1,), 20), b=base[:40], c=base[10:50])


def alternating() -> Names:
    """The first and the last share a record in the file, and memory here with what comes between them."""
    base = torch.zeros(40)
    return Names(a=base, b=base.clone(), c=base)


def interleaved() -> Names:
    base = torch.zeros(40, 3)
    return Names(a=base[:, 0], b=base[:, 1], c=base[:, 2])


def of_two_dtypes() -> Names:
    base = torch.zeros(40)
    return Names(a=base, b=torch.zeros(40), c=base.view(torch.bfloat16)[20:60])


SHARED = [tied, overlapping, alternating, interleaved, of_two_dtypes]


@SEVERAL
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
@pytest.mark.parametrize("records", ["apart", "two of one record"])
@pytest.mark.parametrize("make", SHARED)
def test_memory_that_is_shared_only_here(
    make: Callable[[], Names], records: str, turned: bool, load: str, tmp_path: Path
) -> None:
    """What comes last in the order of the module stays, as with load_state_dict(), in whatever order the file has them."""
    stock, target = make(), make()
    state: dict[str, Any] = {
        name: torch.randn(part.shape).to(part.dtype) + 5 * at for at, (name, part) in enumerate(stock.state_dict().items())
    }
    if records == "two of one record" and state["a"].dtype == state["c"].dtype:
        state["c"] = state["a"]
    state = dict(reversed(state.items())) if turned else state
    stock.load_state_dict(copy.deepcopy(state))
    load_by(load, state, target, tmp_path)
    assert_same(everything(stock), everything(target))


def test_memory_that_is_shared_here_and_there(tmp_path: Path) -> None:
    base = torch.randn(30, 40)
    views = {"a": base, "part": base[3:9], "turned": base.t(), "again": base}
    torch.save(views, tmp_path / "state.pt")
    here = torch.zeros(30, 40)
    ckpt.load_into(tmp_path / "state.pt", {"a": here, "part": here[3:9], "turned": here.t(), "again": here})
    assert torch.equal(here, base)


def test_more_than_a_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt.loading import in_place

    monkeypatch.setattr(in_place, "_TEMPORARY_BYTES", 500)
    state = {str(n): torch.full((100,), float(n)) for n in range(5)}
    state |= {"again": state["1"]}
    torch.save(state, tmp_path / "state.pt")
    base = torch.zeros(104)
    ckpt.load_into(tmp_path / "state.pt", {key: base[at : at + 100] for at, key in enumerate([*"01234", "again"][:5])}, False)
    assert base.tolist() == [0.0, 1.0, 2.0, 3.0] + 100 * [4.0]
    ckpt.load_into(tmp_path / "state.pt", {"1": base[:100], "2": base[:100], "again": base[1:101]}, False)
    assert base.tolist() == [2.0] + 100 * [1.0] + 3 * [4.0]


@pytest.mark.parametrize("size, stride", [((3, 2), (1, 1)), ((2, 3), (2, 1)), ((3,), (0,))])
def test_a_tensor_that_lies_on_itself(size: Any, stride: Any, tmp_path: Path) -> None:
    torch.save({"a": torch.randn(size)}, tmp_path / "state.pt")
    with pytest.raises(MismatchError, match="has elements here that lie on one another"):
        ckpt.load_into(tmp_path / "state.pt", {"a": torch.zeros(9).as_strided(size, stride)})


def test_strides_that_only_look_as_if_it_did(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "state.pt")
    target = torch.zeros(9).as_strided((2, 3), (3, 2))
    ckpt.load_into(tmp_path / "state.pt", {"a": target})
    assert target.tolist() == [[0, 1, 2], [3, 4, 5]]


# ---- optimizers ------------------------------------------------------------------------------------------------------


def learning(rates: list[torch.Tensor]) -> torch.optim.Optimizer:
    return AdamW([{"params": [nn.Parameter(torch.ones(3))], "lr": rate} for rate in rates])


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"].item() for group in optimizer.param_groups]


@SEVERAL
@pytest.mark.parametrize("tied_there", [False, True])
@pytest.mark.parametrize("tied_here", [False, True])
def test_learning_rates(tied_here: bool, tied_there: bool, load: str, tmp_path: Path) -> None:
    def make(tied: bool, rates: list[float]) -> torch.optim.Optimizer:
        made = [torch.tensor(rate) for rate in rates]
        return learning([made[0], made[0]] if tied else made)

    state = make(tied_there, [0.25, 0.5]).state_dict()
    stock, target = (make(tied_here, [0.125, 0.75]) for _ in range(2))
    mine = target.param_groups[0]["lr"]
    stock.load_state_dict(copy.deepcopy(state))
    load_by(load, {"o": state}, {"o": target}, tmp_path)
    assert rates_of(stock) == rates_of(target) == ([0.25, 0.25] if tied_there else [0.25, 0.5])
    assert (stock.param_groups[0]["lr"] is stock.param_groups[1]["lr"]) == tied_there
    assert (target.param_groups[0]["lr"] is target.param_groups[1]["lr"]) == tied_there
    assert mine.item() == 0.125, "it may be that of another optimizer, too"


def stepped(seed: int, parameters: int = 2) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    given = [nn.Parameter(torch.randn(30)) for _ in range(parameters)]
    optimizer = AdamW(given)
    for parameter in given:
        parameter.grad = torch.randn(30)
    optimizer.step()
    return given, optimizer


@SEVERAL
@pytest.mark.parametrize("tied_there", [False, True])
@pytest.mark.parametrize("shift", [None, 0, 10])
def test_states_that_share_memory(shift: int | None, tied_there: bool, load: str, tmp_path: Path) -> None:
    (first, second), saved = stepped(1)
    if tied_there:
        saved.state[second]["exp_avg"] = saved.state[first]["exp_avg"]
    (mine, other), target = stepped(2)
    if shift is not None:
        base = torch.randn(50)
        target.state[mine]["exp_avg"], target.state[other]["exp_avg"] = base[shift : shift + 30], base[:30]
    load_by(load, {"o": saved.state_dict()}, {"o": target}, tmp_path)
    assert_same(zeros_like(saved.state_dict()), zeros_like(target.state_dict()))
    for there, here in ((first, mine), (second, other)):
        assert_same(saved.state[there], target.state[here])
    assert (target.state[mine]["exp_avg"] is target.state[other]["exp_avg"]) == tied_there


@SEVERAL
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_state_that_is_a_parameter(first: str, load: str, tmp_path: Path) -> None:
    given, saved = stepped(1, 1)
    (here,), target = stepped(2, 1)
    saved.state[given[0]]["master"] = torch.full((30,), 7.0)
    target.state[here]["master"] = here.detach()
    state: dict[str, Any] = {"model": {"w": given[0].detach()}, "optimizer": saved.state_dict()}
    parts = {"model": Names(w=here), "optimizer": target}
    load_by(load, state, {first: parts.pop(first), **parts}, tmp_path)
    assert torch.equal(here, given[0]) and torch.equal(target.state[here]["master"], torch.full((30,), 7.0))


class Crossing(AdamW):
    """It has changed the names of its averages."""

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        for mine, theirs in zip(self.state.values(), state["state"].values(), strict=True):
            mine["exp_avg"].copy_(theirs["exp_avg_sq"])
            mine["exp_avg_sq"].copy_(theirs["exp_avg"])


def test_an_optimizer_that_copies_in_its_own_way(tmp_path: Path) -> None:
    (first, _), saved = stepped(1)
    given, other = stepped(2)
    target = Crossing(given)
    target.state = other.state
    load_by("load_into", {"o": saved.state_dict()}, {"o": target}, tmp_path)
    assert torch.equal(target.state[given[0]]["exp_avg"], saved.state[first]["exp_avg_sq"])
    assert torch.equal(target.state[given[0]]["exp_avg_sq"], saved.state[first]["exp_avg"])
