"""Safetensors files from devices and back, on machines that have none: in no order but that of fences and streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device_training import Training, cuda, fake_library, options, state, training
from fake_driver import both_drivers
from support import assert_same

import ckpt

safetensors = pytest.importorskip("safetensors.torch")

__all__ = ["cuda", "fake_library", "training"]
pytestmark = both_drivers


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    """With a view into a storage of its own, of a length that leaves what follows askew."""
    found = {name: each for name, each in state(value).items() if isinstance(each, torch.Tensor)}
    return found | {"codes": torch.arange(60_000, dtype=torch.int64).to(torch.uint8)[3:50_000]}


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("verify", [False, True])
def test_files_hold_what_was_there_at_the_call(training: Training, tmp_path: Path, lazy: bool, verify: bool) -> None:
    current = tensors()
    training.cuda.hold_copies(lazy and not verify)  # else save() itself waits for some
    how = options(arena_bytes="8MiB", verify_capture=verify)
    pending = ckpt.save(current, tmp_path / "a.safetensors", lazy=lazy, options=how)
    ckpt.fence()
    for each in current.values():
        training.fill(each, 0xEE)
    training.cuda.hold_copies(False)
    safetensors.save_file(tensors(), tmp_path / "b")
    assert pending.result(30).read_bytes() == (tmp_path / "b").read_bytes()
    training.synchronize()
    training.cuda.assert_no_violation()


@pytest.mark.parametrize("how", ["load", "load_into"])
def test_loads_go_straight_to_devices(training: Training, tmp_path: Path, how: str) -> None:
    safetensors.save_file(tensors(), tmp_path / "a.safetensors")
    before = training.cuda.count("cuMemcpyHtoDAsync")
    if how == "load":
        found = ckpt.load(tmp_path / "a.safetensors", map_location="cuda:1")
        assert {training.placed(each) for each in found.values()} == {1}
    else:
        found = {name: torch.zeros_like(each) for name, each in tensors().items()}
        ckpt.load_into(tmp_path / "a.safetensors", found)
    training.synchronize()
    assert training.cuda.count("cuMemcpyHtoDAsync") > before
    training.cuda.assert_no_violation()
    assert_same(tensors() | {"codes": tensors()["codes"].clone()}, {name: found[name] for name in tensors()})
