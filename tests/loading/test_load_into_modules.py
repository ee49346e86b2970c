"""load_into() and restore(into=) give modules what load_state_dict() of torch would, in whatever way they load their state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options
from test_load_into import pointers
from torch import nn

import ckpt
from ckpt import torch_private
from ckpt.errors import MismatchError
from ckpt.loading import target_match

SEVERAL = pytest.mark.parametrize("load", ["load_into", "restore"])


def load_by(load: str, state: Any, target: Any, directory: Path, strict: bool = True) -> None:
    if load == "load_into":
        torch.save(state, directory / "state.pt")
        ckpt.load_into(directory / "state.pt", target, strict)
        return
    with ckpt.Checkpointer(directory / "job", options=options()) as checkpointer:
        checkpointer.save(1, state).result(60)
        assert checkpointer.restore(into=target, strict=strict) is not None


def everything(module: nn.Module) -> dict[str, torch.Tensor]:
    """What the module computes with, whatever its state_dict() says."""
    return {name: part.detach().clone() for name, part in [*module.named_parameters(), *module.named_buffers()]}


# ---- ways of their own -----------------------------------------------------------------------------------------------


class Copies(nn.Linear):
    def state_dict(self, *rest: Any, **how: Any) -> Any:
        return {name: value.clone() for name, value in super().state_dict(*rest, **how).items()}


class Saving(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach().t().contiguous()
        destination[prefix + "bias"] = self.bias.detach() / 2

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state[prefix + "weight"].t())
            self.bias.copy_(state[prefix + "bias"] * 2)


class Doubling(nn.Linear):
    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, *rest)


class Adding(nn.Linear):
    def load_state_dict(self, state: Any, *rest: Any, **how: Any) -> Any:
        return super().load_state_dict({key: value + 1 for key, value in state.items()}, *rest, **how)


def in_half() -> nn.Module:
    def to_half(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in list(state):
            state[key] = state[key].half()

    module = nn.Linear(4, 4)
    module.register_state_dict_post_hook(to_half)
    return module


def swapping() -> nn.Module:
    """As a module whose weights have changed their names."""

    def swap(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state["0.bias"], state["1.bias"] = state["1.bias"], state["0.bias"]

    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module.register_load_state_dict_pre_hook(swap)
    return module


def deriving() -> nn.Module:
    """It keeps something that is made of its weights."""

    def derive(module: nn.Module, keys: Any) -> None:
        module.total = module.weight.sum().detach()

    module = nn.Linear(4, 4)
    module.register_buffer("total", torch.zeros(()), persistent=False)
    module.register_load_state_dict_post_hook(derive)
    return module


def patched() -> nn.Module:
    module = nn.Linear(4, 4)
    yielded = module.state_dict
    module.state_dict = lambda *rest, **how: {name: value.clone() for name, value in yielded(*rest, **how).items()}  # type: ignore
    return module


def scaled() -> nn.Module:
    return torch.nn.utils.spectral_norm(nn.Linear(4, 4))


def quantized() -> nn.Module:
    return torch.ao.quantization.FakeQuantize()


OWN_WAYS: dict[str, Callable[[], nn.Module]] = {
    "state_dict": lambda: Copies(4, 4),
    "_save_to_state_dict": lambda: Saving(4, 4),
    "_load_from_state_dict": lambda: Doubling(4, 4),
    "load_state_dict": lambda: Adding(4, 4),
    "hook that saves": in_half,
    "hook that loads": swapping,
    "hook that derives": deriving,
    "patched": patched,
    "spectral_norm": scaled,
    "FakeQuantize": quantized,
}


@SEVERAL
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "submodule"])
@pytest.mark.parametrize("way", OWN_WAYS)
def test_ways_of_their_own(way: str, inside: bool, load: str, tmp_path: Path) -> None:
    if inside and way in ("load_state_dict", "hook that loads"):
        pytest.skip("torch does not ask submodules for it; this hook knows its names")

    def make() -> nn.Module:
        return nn.ModuleDict({"plain": nn.Linear(3, 3), "other": OWN_WAYS[way]()}) if inside else OWN_WAYS[way]()

    saved, stock, target = make(), make(), make()
    state = copy.deepcopy(saved.state_dict())
    more = torch.ones(3)
    stock.load_state_dict(copy.deepcopy(state))
    load_by(load, {"module": state, "more": more}, {"module": target, "more": (filled := torch.zeros(3))}, tmp_path)
    assert_same(everything(stock), everything(target))
    assert torch.equal(filled, more)


def test_modules_that_are_not_known_to_load_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that does not tell."""
    monkeypatch.setattr(torch_private, "module_is_plain", lambda module: False)
    monkeypatch.setattr(torch_private, "optimizer_is_plain", lambda optimizer: False)
    saved, target = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    saved(torch.randn(3, 4))
    load_by("load_into", saved.state_dict(), target, tmp_path)
    assert_same(saved.state_dict(), target.state_dict())


def test_modules_that_have_no_memory_yet(tmp_path: Path) -> None:
    saved, lazy = nn.Linear(4, 3), nn.LazyLinear(3)
    load_by("load_into", saved.state_dict(), lazy, tmp_path)
    assert torch.equal(lazy.weight, saved.weight)
    for module in (nn.Linear(4, 3, device="meta"), Copies(4, 3, device="meta")):
        with pytest.raises(MismatchError, match="has no memory here yet"):
            ckpt.load_into(tmp_path / "state.pt", module)


@SEVERAL
def test_what_such_a_module_refuses(load: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(MismatchError, match=r"does not fit.*size mismatch for weight.*may have been loaded in part") as caught:
        load_by(load, {"module": nn.Linear(5, 4).state_dict()}, {"module": Copies(4, 4)}, tmp_path)
    assert len(caught.value.problems) == 1 and "Nothing was changed" not in str(caught.value)
    with pytest.raises(MismatchError, match=r"module is a Tensor in the file, and the state of a module here"):
        load_by(load, {"module": torch.ones(3)}, {"module": Copies(4, 4)}, tmp_path_factory.mktemp("other"))


def test_keys_that_only_one_side_of_such_a_module_has(tmp_path: Path) -> None:
    torch.save({"m": {"weight": torch.ones(4, 4), "scale": torch.ones(1)}}, tmp_path / "state.pt")
    target = Copies(4, 4)
    with pytest.raises(MismatchError, match=r'Unexpected key.*"scale"'):
        ckpt.load_into(tmp_path / "state.pt", {"m": Copies(4, 4)})
    done = ckpt.load_into(tmp_path / "state.pt", {"m": target}, strict=False)
    assert done == (["m.weight"], ["m.bias"], ["m.scale"]) and torch.equal(target.weight, torch.ones(4, 4))


def test_plain_modules_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied in them that torch itself has given: no memory is made for what they hold."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a copy is loaded")

    def make() -> nn.Module:
        first = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
        second = nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), nn.BatchNorm1d(4), nn.Embedding(3, 4))
        return torch.optim.swa_utils.AveragedModel(nn.Sequential(first, second, torch.compile(nn.Linear(2, 2))))

    saved, target = make(), make()
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    before = pointers(dict(target.state_dict()))
    monkeypatch.setattr(target_match.TargetMatch, "_give_module", refuse)
    ckpt.load_into(tmp_path / "state.pt", target)
    assert_same(dict(saved.state_dict()), dict(target.state_dict()))
    assert pointers(dict(target.state_dict())) == before


# ---- extra state -----------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """Its extra state is whatever it was given."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@SEVERAL
@pytest.mark.parametrize(
    "extra",
    [torch.tensor([7.0]), 8, {"history": [torch.arange(3), "x"], "more": {}}, torch.arange(5)[2:], [], None],
    ids=["tensor", "number", "nested", "view", "empty", "none"],
)
@pytest.mark.parametrize("here", [torch.zeros(3), None, {"history": 1}], ids=["tensor", "none", "nested"])
def test_extra_states_are_given_back(here: Any, extra: Any, load: str, tmp_path: Path) -> None:
    saved, target = nn.Sequential(nn.Linear(2, 2), Scaled(4, 4)), nn.Sequential(nn.Linear(2, 2), Scaled(4, 4))
    saved[1].extra, target[1].extra = extra, here
    weight = target[1].weight.data_ptr()
    load_by(load, saved.state_dict(), target, tmp_path)
    assert_same(dict(saved.state_dict()), dict(target.state_dict()))
    assert target[1].weight.data_ptr() == weight


def test_an_extra_state_that_only_one_side_has(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 4).state_dict(), tmp_path / "state.pt")
    target = Scaled(4, 4)
    target.extra = 5
    with pytest.raises(MismatchError, match="_extra_state is missing in the file"):
        ckpt.load_into(tmp_path / "state.pt", target)
    assert ckpt.load_into(tmp_path / "state.pt", target, strict=False).missing == ["_extra_state"] and target.extra == 5


class OneWay(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.ones(1)


def test_an_extra_state_that_a_module_does_not_take_back(tmp_path: Path) -> None:
    torch.save(OneWay(4, 4).state_dict(), tmp_path / "state.pt")
    with pytest.raises(MismatchError, match="Unexpected key"):
        ckpt.load_into(tmp_path / "state.pt", OneWay(4, 4))
