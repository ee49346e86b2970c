"""Training that computes in another context of a device than the primary one, as in a green one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from device_training import Training, cuda, fake_library, options, state, training
from fake_driver import DEFAULT_STREAM
from support import assert_same, wait_until

import ckpt
from ckpt.errors import DeviceError

__all__ = ["cuda", "fake_library", "training"]

PAUSE_S = 0.05
STREAMS = ["a stream of its own", "the default stream"]


@contextmanager
def in_green_context(training: Training, which: str) -> Iterator[None]:
    """What is enqueued on the default stream goes to that of the context."""
    before = training.streams[0]
    with training.cuda.green_context():
        training.streams[0] = DEFAULT_STREAM if which == STREAMS[1] else training.cuda.stream_in_current_context()
        yield
        training.cuda.synchronize(0, training.streams[0])
        training.streams[0] = before


@pytest.mark.parametrize("which", STREAMS)
@pytest.mark.parametrize("lazy", [True, False])
def test_a_save_there_copies_by_torch(which: str, lazy: bool, training: Training, tmp_path: Path) -> None:
    with in_green_context(training, which):
        with ckpt.Checkpointer(tmp_path / "steps", options=options()) as checkpointer:
            pending = checkpointer.save(1, state(), lazy=lazy)
            ckpt.fence()
            assert_same(state(), torch.load(pending.result(30) / "state.pt"))
        pending = ckpt.save(state(2.0), tmp_path / "a.pt", lazy=lazy, options=options())
        ckpt.fence()
        assert_same(state(2.0), torch.load(pending.result(30)))
        assert pending.stats.bytes_from_devices == 0
        assert training.cuda.count("cuMemcpyDtoHAsync") == 0
    pending = ckpt.save(state(3.0), tmp_path / "a.pt", lazy=lazy, options=options())
    assert_same(state(3.0), torch.load(pending.result(30)))
    assert pending.stats.bytes_from_devices > 1_000_000


@pytest.mark.parametrize("sealed", [True, False], ids=["behind another fence", "the first"])
@pytest.mark.parametrize("which", STREAMS)
@pytest.mark.parametrize("cache", [0, "4MiB"])
def test_the_host_waits_at_a_fence_there(
    cache: int | str, which: str, sealed: bool, training: Training, tmp_path: Path
) -> None:
    """What is launched there cannot be put behind the copies."""
    how = options(device_cache=cache, arena_bytes="16MiB")
    ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=how).result(30)
    current = state(2.0)
    training.cuda.hold_copies(True)
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=how)
    if sealed:
        ckpt.fence()
    with in_green_context(training, which):
        release = threading.Thread(target=lambda: (time.sleep(PAUSE_S), training.cuda.hold_copies(False)))
        release.start()
        ckpt.fence()
        for value in current.values():
            if isinstance(value, torch.Tensor):
                training.fill(value, 0xEE)
        release.join()
        assert_same(state(2.0), torch.load(pending.result(30)))


@pytest.mark.parametrize("which", STREAMS)
def test_a_load_there_goes_by_way_of_the_host(
    which: str, training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state(), tmp_path / "a.pt")
    target = state(0.0)
    with in_green_context(training, which), caplog.at_level(logging.WARNING):
        ckpt.load_into(tmp_path / "a.pt", target)
    assert_same(state(), target)
    assert any("green context" in record.getMessage() for record in caplog.records)


def test_the_default_stream_while_another_device_is_current(training: Training, tmp_path: Path) -> None:
    """It is that of the primary context of the device that is named."""
    training.streams[0] = DEFAULT_STREAM
    training.cuda.make_current(1)
    pending = ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options())
    ckpt.fence()
    assert_same(state(), torch.load(pending.result(30)))
    assert pending.stats.bytes_from_devices > 1_000_000
    training.cuda.make_current(0)


def test_other_errors_of_the_driver_are_raised(training: Training, tmp_path: Path) -> None:
    training.cuda.fail("cuEventRecord", code=2)
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options())
    wait_until(lambda: not list(tmp_path.iterdir()))
