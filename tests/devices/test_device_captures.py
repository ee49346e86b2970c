"""A graph is captured elsewhere in the process: the calls that would break that are made by threads that may make them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from device_rig import EAGER, LAZY, MIB, Rig
from device_training import Training, cuda, fake_library, training
from fake_driver import FakeCuda
from support import DEADLINE_S

import ckpt

__all__ = ["cuda", "fake_library", "training"]


@pytest.fixture
def captured(cuda: FakeCuda) -> Iterator[FakeCuda]:
    """From now on, in the mode in which torch captures by default."""
    yield cuda
    cuda.capture_globally(False)
    assert cuda.count("captures broken") == 0


@pytest.mark.parametrize("cache", [0, 8 * MIB])
@pytest.mark.parametrize("verify", [False, True])
def test_all_of_a_save(captured: FakeCuda, tmp_path: Path, verify: bool, cache: int) -> None:
    """The first one, which makes streams and pins memory, and the end of the engine, which gives all of that back."""
    captured.configure(seed=1, most_delay_s=0.0005)
    rig = Rig(captured, tmp_path, device_cache_bytes=cache)
    captured.capture_globally(True)
    for _ in range(3):
        saved = rig.save([2 * MIB, 300_000, 9], [LAZY, EAGER, LAZY], [0, 1, 1], verify=verify)
        rig.overwrite(saved, EAGER)
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, LAZY)
        rig.check(saved)
    rig.end()


def test_a_save_that_fails(captured: FakeCuda, tmp_path: Path) -> None:
    rig = Rig(captured, tmp_path)
    captured.capture_globally(True)
    captured.fail("cuMemcpyDtoHAsync", skip=3, late=True)
    bad = rig.save([2 * MIB], [LAZY], [0])
    assert bad.job.wait_finished(DEADLINE_S) and "ILLEGAL_ADDRESS" in str(bad.job.error)
    rig.end()


def test_a_load(captured: FakeCuda, training: Training, tmp_path: Path) -> None:
    state = {"a": torch.randn(300_000), "b": torch.arange(9)}
    torch.save(state, tmp_path / "a.pt")
    captured.capture_globally(True)
    found = ckpt.load(tmp_path / "a.pt", map_location="cuda:0")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_the_mode_of_the_caller_is_put_back(captured: FakeCuda, tmp_path: Path) -> None:
    rig = Rig(captured, tmp_path)
    rig.check(rig.save([100_000, 5], [LAZY, EAGER], [0, 1]))
    rig.engine.fence(rig.streams)
    assert captured.exchange_capture_mode(0) == 0
    rig.end()
    captured.capture_globally(True)
