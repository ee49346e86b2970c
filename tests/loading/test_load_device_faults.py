"""When the driver fails during a load to devices: it goes by way of the host, and what copies still use stays."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from device_training import Training, cuda, fake_library, training
from support import DEADLINE_S, assert_same, wait_until
from support import options as host_options
from test_load_devices import carried, layers, tensors_of, torch_saved, warnings_of
from test_load_into import zeros_like
from test_restore_into import own

import ckpt
from ckpt.devices import HOST
from ckpt.errors import DeadlineError, DeviceError
from ckpt.loading import archive

__all__ = ["cuda", "fake_library", "training"]

FAILURES: dict[str, dict[str, Any]] = {
    "a copy": {"call": "cuMemcpyHtoDAsync", "skip": 1},
    "a copy, late": {"call": "cuMemcpyHtoDAsync", "skip": 1, "late": True},
    "a stream": {"call": "cuStreamCreate"},
    "an event": {"call": "cuEventCreate", "skip": 1},
    "marking": {"call": "cuEventRecord", "skip": 2},
    "the context": {"call": "cuDevicePrimaryCtxRetain"},
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("how", ["load", "into"])
def test_then_it_goes_by_way_of_the_host(
    failure: str, how: str, training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = layers()
    path = torch_saved(state, tmp_path / "state.pt")
    training.cuda.configure(seed=5, most_delay_s=0.0005)
    training.cuda.fail(**FAILURES[failure])
    if how == "into":
        target = zeros_like(state)
        ckpt.load_into(path, target)
        assert_same(state, target)
    else:
        with pytest.raises(Exception, match=r"CUDA|cuda"):  # by torch, which is to move it and sees no device here
            ckpt.load(path, map_location="cuda:0")
    assert len(warnings_of(caplog)) == 1 and "by way of host memory" in warnings_of(caplog)[0]


def test_memory_that_cannot_be_pinned_serves_all_the_same(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = layers()
    training.cuda.configure(seed=7, most_delay_s=0.001)
    for _ in range(2 * archive.reader_threads()):
        training.cuda.fail("cuMemHostRegister")
    assert_same(state, ckpt.load(torch_saved(state, tmp_path / "state.pt"), "cuda:0"))
    assert training.cuda.count("pageable copies") > 0 and not warnings_of(caplog)


def test_a_capture_is_not_disturbed(training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A copy on a stream that waits for one that is being captured would become part of the graph."""
    state = layers()
    path = torch_saved(state, tmp_path / "state.pt")
    training.cuda.set_capturing(0, training.streams[0], True)
    target = zeros_like(state)
    with pytest.raises(DeviceError, match="captured into a graph") as caught:
        ckpt.load_into(path, target)
    assert caught.value.capturing and caught.value.code == 900
    assert not any(tensor.any() for tensor in tensors_of(target)), "nothing has been written"
    with pytest.raises(DeviceError, match="captured into a graph"):
        ckpt.load(path, map_location="cuda:0")
    training.cuda.set_capturing(0, training.streams[0], False)
    assert not carried(training) and not warnings_of(caplog)


def test_a_restore_during_a_capture_leaves_no_rank_waiting(training: Training, tmp_path: Path) -> None:
    """The checkpoint is good, and the others are told so; this rank raises when all have chosen."""
    training.on = lambda storage: HOST
    with ckpt.Checkpointer(tmp_path, options=host_options()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, own(step)).result(DEADLINE_S)
        training.cuda.set_capturing(0, training.streams[0], True)
        target = zeros_like(own(2))
        training.on = lambda storage: 0
        for how in ({"map_location": "cuda:0"}, {"into": target}):
            with pytest.raises(DeviceError, match="captured into a graph"):
                checkpointer.restore(**how)
        training.cuda.set_capturing(0, training.streams[0], False)
        found = checkpointer.restore(into=target)
        assert found is not None and found.step == 2


@pytest.mark.slow
def test_a_device_that_hangs_meets_the_deadline(training: Training, tmp_path: Path) -> None:
    """And what it may still write to and read from stays."""
    path = torch_saved({"a": torch.randn(1_000_000)}, tmp_path / "state.pt")
    training.cuda.hold_copies(True)
    with pytest.raises(DeadlineError, match="longer than"):
        ckpt.load(path, map_location="cuda:0", timeout_s=0.2)
    assert training.cuda.alive()["registrations"] > training.cuda.before["registrations"]
    training.cuda.hold_copies(False)
    wait_until(lambda: training.cuda.alive() == training.cuda.before, what="the end of the copies")


@pytest.mark.parametrize("call", ["cuCtxGetCurrent", "cuCtxSetCurrent"])
def test_copies_that_cannot_be_asked_about_are_waited_for(
    call: str, training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A context that cannot be entered says nothing of them: they may still be on their way."""
    state = {"a": torch.randn(1_000_000)}
    path, target = torch_saved(state, tmp_path / "state.pt"), zeros_like(state)
    training.cuda.hold_copies(True)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(ckpt.load_into, path, target)
        try:
            wait_until(lambda: training.cuda.count("cuEventQuery") > 0, what="the first question")
            asked = training.cuda.count(call)
            for _ in range(4):
                training.cuda.fail(call)
            wait_until(lambda: loading.done() or training.cuda.count(call) > asked + 20, what="more questions")
            assert not loading.done()
            assert training.cuda.alive()["frees of memory in use"] == training.cuda.before["frees of memory in use"]
        finally:
            training.cuda.hold_copies(False)
        loading.result(DEADLINE_S)
    assert_same(state, target)
    assert not warnings_of(caplog)
