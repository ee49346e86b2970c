"""load_into(): all of the file is where it belongs, or nothing has changed."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options

import ckpt
from ckpt.errors import CheckpointError, CorruptError, MismatchError
from ckpt.loading import archive


def zeros_like(state: Any) -> Any:
    """The same containers, with zeros in tensors of their own."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state, requires_grad=state.requires_grad)
    if isinstance(state, dict):
        return type(state)((key, zeros_like(value)) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(zeros_like(value) for value in state)
    return state


def pointers(state: Any) -> list[int]:
    if isinstance(state, torch.Tensor):
        return [state.data_ptr()]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [pointer for part in parts for pointer in pointers(part)]


def mixed_state() -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "large": torch.randn(700, 1001),
        "turned": torch.randn(300, 500).t(),
        "channels": torch.randn(2, 3, 40, 50).to(memory_format=torch.channels_last),
        "half": torch.randn(33).bfloat16(),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "nested": [torch.arange(5), {"x": torch.randn(70_000, dtype=torch.float64)}, (torch.ones(3, dtype=torch.bool), 4)],
        "step": 17,
        "name": "a model",
    }


@pytest.mark.parametrize("writer", ["ours", "ours_lazy", "torch"])
def test_fills_what_is_there(writer: str, tmp_path: Path) -> None:
    state, path = mixed_state(), tmp_path / "state.pt"
    if writer == "torch":
        torch.save(state, path)
    else:
        ckpt.save(state, path, lazy=True if writer == "ours_lazy" else None, options=options(eager_bytes=0)).result(60)
    target = zeros_like(state)
    target["step"], target["name"] = 0, ""
    before, versions = pointers(target), target["large"]._version
    done = ckpt.load_into(path, target)
    assert {"large", "nested.1.x", "name"} <= set(done.loaded) and done.missing == done.unexpected == []
    assert_same(state, target)
    assert pointers(target) == before
    assert target["large"]._version > versions


@pytest.mark.parametrize("make", [lambda t: t.new_zeros(t.shape[::-1]).t(), lambda t: t.new_zeros((*t.shape, 2))[..., 1]])
def test_targets_may_be_strided_otherwise(make: Any, tmp_path: Path) -> None:
    state = {"a": torch.randn(300, 400), "b": torch.randn(7, 8)}
    torch.save(state, tmp_path / "state.pt")
    target = {key: make(tensor) for key, tensor in state.items()}
    around = {key: tensor.untyped_storage().nbytes() for key, tensor in target.items()}
    ckpt.load_into(tmp_path / "state.pt", target)
    for key, tensor in state.items():
        assert torch.equal(target[key], tensor) and target[key].stride() != tensor.stride()
        if around[key] > tensor.nbytes:
            assert target[key]._base is not None and torch.count_nonzero(target[key]._base[..., 0]) == 0


def test_shared_records(tmp_path: Path) -> None:
    """Tied in the file and not here, here and not in the file, parts of one storage, and one storage as two dtypes."""
    base = torch.randn(1000)
    tied = {"a": base, "b": base.view(10, 100), "part": base[10:20], "turned": base.view(20, 50).t()}
    torch.save(tied, tmp_path / "tied.pt")
    apart = {"a": torch.zeros(1000), "b": torch.zeros(10, 100), "part": torch.zeros(10), "turned": torch.zeros(50, 20)}
    ckpt.load_into(tmp_path / "tied.pt", apart)
    assert all(torch.equal(apart[key], tied[key]) for key in tied)
    again = torch.zeros(1000)
    ckpt.load_into(
        tmp_path / "tied.pt", {"a": again, "b": again.view(10, 100), "part": again[10:20], "turned": again.view(20, 50).t()}
    )
    assert torch.equal(again, base)

    torch.save({"a": torch.ones(5), "b": torch.full((5,), 2.0)}, tmp_path / "apart.pt")
    one = torch.zeros(5)
    ckpt.load_into(tmp_path / "apart.pt", {"a": one, "b": one})  # as load_state_dict(): the last one stays
    assert torch.equal(one, torch.full((5,), 2.0))

    bits = {"f": base, "i": base.view(torch.int32)[3:9]}
    ckpt.save(bits, tmp_path / "bits.pt", options=options()).result(60)
    filled = {"f": torch.zeros(1001)[1:], "i": torch.zeros(6, dtype=torch.int32)}
    ckpt.load_into(tmp_path / "bits.pt", filled)
    assert torch.equal(filled["f"], base) and torch.equal(filled["i"], bits["i"])


def network() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 20))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_modules_and_optimizers_resume(stepped: bool, tmp_path: Path) -> None:
    model, optimizer = network()
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.05
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}
    ckpt.save(state, tmp_path / "state.pt", options=options()).result(60)
    other_model, other_optimizer = network()
    if stepped:
        train(other_model, other_optimizer, 1)
    target = {"model": other_model, "optimizer": other_optimizer, "step": 0}
    weight = other_model[0].weight.data_ptr()
    ckpt.load_into(tmp_path / "state.pt", target)
    assert target["step"] == 2 and other_model[0].weight.data_ptr() == weight
    train(model, optimizer)
    train(other_model, other_optimizer)
    assert_same(model.state_dict(), other_model.state_dict())
    assert_same(optimizer.state_dict(), other_optimizer.state_dict())


class WithExtra(torch.nn.Linear):
    extra = 0

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_of_modules(tmp_path: Path) -> None:
    model, other = WithExtra(2, 3), WithExtra(2, 3)
    model.extra = 8
    torch.save(model.state_dict(), tmp_path / "state.pt")
    ckpt.load_into(tmp_path / "state.pt", other)
    assert other.extra == 8 and torch.equal(model.weight, other.weight)


def test_all_that_does_not_fit_is_told_at_once_and_nothing_changes(tmp_path: Path) -> None:
    torch.save(
        {
            "a": torch.ones(3),
            "b": torch.ones(2, 2),
            "c": torch.ones(4),
            "d": 1,
            "l": [1, 2],
            "t": (1, 2),
            "good": torch.ones(9),
        },
        tmp_path / "state.pt",
    )
    target = {
        "a": torch.zeros(4),
        "b": torch.zeros(2, 2, dtype=torch.half),
        "d": torch.zeros(1),
        "l": [1],
        "t": (1, 3),
        "good": torch.zeros(9),
        "more": torch.zeros(1),
    }
    with pytest.raises(MismatchError) as caught:
        ckpt.load_into(tmp_path / "state.pt", target)
    text = str(caught.value)
    for part in (
        "a has shape [3] in the file, and [4] here",
        "b is torch.float32 in the file, and torch.float16 here",
        "c is in the file, and not here",
        "more is missing in the file",
        "d is 1 in the file, and a tensor here",
        "l has 1 parts here, and in the file: 2",
        "t.1 is 2 in the file, and 3 here, which cannot be changed in place",
    ):
        assert part in text
        assert part in caught.value.problems
    assert "good" not in text and torch.count_nonzero(target["good"]) == 0
    assert isinstance(caught.value, CheckpointError)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    state = {str(n): torch.ones(1) for n in range(100)}
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(MismatchError, match=r"4 is in the file, and not here; 95 more are in the file, and not here") as caught:
        ckpt.load_into(tmp_path / "state.pt", {"net": dict(state)})
    assert len(caught.value.problems) == 101
    assert "net is missing in the file" in str(caught.value) and "5 is in" not in str(caught.value)
    with pytest.raises(MismatchError, match=r"19 has shape .* here; and 80 more\. Nothing"):
        ckpt.load_into(tmp_path / "state.pt", {key: torch.ones(2) for key in state})


def test_not_strict_passes_over_keys_and_nothing_else(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "only_there": torch.ones(2)}, tmp_path / "state.pt")
    target = {"a": torch.zeros(3), "only_here": torch.zeros(2)}
    ckpt.load_into(tmp_path / "state.pt", target, strict=False)
    assert torch.equal(target["a"], torch.ones(3)) and torch.count_nonzero(target["only_here"]) == 0
    with pytest.raises(MismatchError, match="shape"):
        ckpt.load_into(tmp_path / "state.pt", {"a": torch.zeros(2)}, strict=False)


@pytest.mark.parametrize(
    "here",
    [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(1).expand(3), torch.nn.UninitializedParameter()],
)
def test_what_cannot_be_filled_is_refused(here: Any, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "state.pt")
    with pytest.raises(MismatchError, match=r"^'.*a (is no plain|has no memory|has elements)"):
        ckpt.load_into(tmp_path / "state.pt", {"a": here})


def test_optimizers_that_differ(tmp_path: Path) -> None:
    _, optimizer = network()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(MismatchError, match=r"groups of \[6\] parameters in the file, and of \[1\] here"):
        ckpt.load_into(tmp_path / "state.pt", {"optimizer": other})
    with pytest.raises(MismatchError, match="state of an optimizer"):
        ckpt.load_into(tmp_path / "state.pt", other)


def test_the_state_of_an_optimizer_that_has_not_stepped_holds_nothing_to_fill(tmp_path: Path) -> None:
    """The optimizer itself takes what the file has; strict=False would lose it."""
    model, optimizer = network()
    train(model, optimizer)
    ckpt.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt").result(60)
    other, fresh = network()
    with pytest.raises(MismatchError, match=r"optimizer\.state\.0 is in the file.*give the optimizer itself") as told:
        ckpt.load_into(tmp_path / "x.pt", {"model": other, "optimizer": fresh.state_dict()})
    assert "strict=False" not in str(told.value)
    ckpt.load_into(tmp_path / "x.pt", {"model": other, "optimizer": fresh})
    assert_same(optimizer.state_dict(), fresh.state_dict())


def test_damage_is_found(tmp_path: Path) -> None:
    state = {"a": torch.randn(100_000), "b": torch.randn(100)}
    torch.save(state, tmp_path / "state.pt")
    good = (tmp_path / "state.pt").read_bytes()
    at = good.index(state["a"].numpy().tobytes()[:64]) + 1234
    (tmp_path / "state.pt").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(CorruptError, match="data/0"):
        ckpt.load_into(tmp_path / "state.pt", zeros_like(state))


def test_the_old_format_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"use load\(\)"):
        ckpt.load_into(tmp_path / "old.pt", {"a": torch.zeros(3)})


def test_a_save_in_flight_keeps_what_it_was_given(tmp_path: Path) -> None:
    weights = torch.full((3_000_000,), 1.0)
    torch.save({"w": torch.full((3_000_000,), 2.0)}, tmp_path / "two.pt")
    pending = ckpt.save({"w": weights}, tmp_path / "one.pt", lazy=True, options=options())
    ckpt.load_into(tmp_path / "two.pt", {"w": weights})
    pending.result(60)
    assert torch.equal(ckpt.load(tmp_path / "one.pt")["w"], torch.full((3_000_000,), 1.0))
    assert torch.equal(weights, torch.full((3_000_000,), 2.0))


def test_large_tensors_need_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is read goes to the tensors themselves: no memory is made for it."""
    state = OrderedDict((str(n), torch.randn(100_000)) for n in range(5))
    torch.save(state, tmp_path / "state.pt")
    target = zeros_like(state)
    read: list[int] = []
    fill = archive.Archive.fill

    def spy(self: archive.Archive, destinations: Any, **how: Any) -> Any:
        read.extend(place.data_ptr() for place in destinations.values())
        return fill(self, destinations, **how)

    monkeypatch.setattr(archive.Archive, "fill", spy)
    ckpt.load_into(tmp_path / "state.pt", target)
    assert_same(state, target)
    assert set(pointers(target)) <= set(read)
    assert len(read) - len(pointers(target)) < 10  # the pickle and its companions
