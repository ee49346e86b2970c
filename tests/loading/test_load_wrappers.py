"""Tensors of classes that wrap others, as quantized weights are: what lies beside them in a file loads, and they load whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import options
from torch.utils._pytree import tree_map

import ckpt
from ckpt.errors import CheckpointError, CorruptError, MismatchError


class Scaled(torch.Tensor):
    """An integer tensor and a scale that look like one of floats."""

    values: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: Any) -> Scaled:
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].values, arguments[0].scale)

        def plain(item: Any) -> Any:
            return item.values * item.scale if isinstance(item, Scaled) else item

        return function(*tree_map(plain, arguments), **tree_map(plain, named or {}))


def make() -> dict[str, Any]:
    torch.manual_seed(0)
    wrapped = Scaled(torch.randint(-9, 9, (300, 300), dtype=torch.int8), torch.tensor(0.5))
    return {"wrapped": wrapped, "plain": torch.randn(300, 300), "other": {"small": torch.arange(5.0), "n": 3}}


def same(wrapped: Any, expected: Any) -> bool:
    return (
        type(wrapped) is Scaled and torch.equal(wrapped.values, expected.values) and torch.equal(wrapped.scale, expected.scale)
    )


@pytest.fixture(params=["ours", "torch"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = tmp_path / "state.pt"
    if request.param == "torch":
        torch.save(make(), target)
    else:
        ckpt.save(make(), target, options=options()).result(60)
    return target


def test_all_of_it(path: Path) -> None:
    found = ckpt.load(path, weights_only=False)
    assert same(found["wrapped"], make()["wrapped"]) and torch.equal(found["plain"], make()["plain"])


@pytest.mark.parametrize("map_location", [None, "cpu", torch.device("cpu")])
def test_parts(map_location: Any, path: Path) -> None:
    found = ckpt.load(path, map_location, weights_only=False, keys=["plain", "other.*"])
    assert found.keys() == {"plain", "other"} and torch.equal(found["plain"], make()["plain"])
    assert torch.equal(found["other"]["small"], torch.arange(5.0)) and found["other"]["n"] == 3
    found = ckpt.load(path, map_location, weights_only=False, keys="wrapped")
    assert found.keys() == {"wrapped"} and same(found["wrapped"], make()["wrapped"])


def test_into_what_is_there(path: Path) -> None:
    target: dict[str, Any] = {"plain": torch.zeros(300, 300), "other": {"small": torch.zeros(5), "n": 0}}
    done = ckpt.load_into(path, target, strict=False, weights_only=False)
    assert done.unexpected == ["wrapped"] and torch.equal(target["plain"], make()["plain"]) and target["other"]["n"] == 3
    with pytest.raises(MismatchError, match=r"wrapped is no plain strided tensor: load\(\) can load it"):
        ckpt.load_into(path, make(), weights_only=False)


def test_a_restore_into_what_is_there(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, make()).result(60)
        target: dict[str, Any] = {"plain": torch.zeros(300, 300)}
        found = checkpointer.restore(into=target, strict=False, weights_only=False)
        assert found is not None and torch.equal(target["plain"], make()["plain"])
        with pytest.raises(MismatchError, match="wrapped is no plain strided tensor"):
            checkpointer.restore(into=make(), weights_only=False)


def test_a_function_for_locations_is_refused_in_our_words(path: Path) -> None:
    with pytest.raises(CheckpointError, match="a class that wraps others, which torch makes only if map_location is a device"):
        ckpt.load(path, lambda storage, _: storage, weights_only=False)


def test_under_a_mode_of_fake_tensors(tmp_path: Path) -> None:
    """As torch.load does it; and what is tried at first use is not tried then."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    path = tmp_path / "x.pt"
    ckpt.save({"a": torch.randn(300, 300), "b": {"c": torch.ones(3)}}, path, options=options()).result(60)
    with FakeTensorMode():
        whole, part = ckpt.load(path), ckpt.load(path, keys="b")
        assert type(whole["a"]) is FakeTensor and whole["a"].shape == (300, 300)
        assert part.keys() == {"b"} and part["b"]["c"].shape == (3,)
        with pytest.raises(CheckpointError, match=r"leave the mode\s+first"):
            ckpt.load_into(path, {"a": torch.zeros(300, 300), "b": {"c": torch.zeros(3)}})
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    with FakeTensorMode(), pytest.raises(CorruptError):
        ckpt.load(path)
