"""check_devices(): a device that keeps the order of streams passes, one that does not is found out, or says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from command_line import Shell
from device_training import Training, cuda, fake_library, training
from fake_driver import DEFAULT_STREAM, ILLEGAL_ADDRESS, FakeCuda, both_drivers

import ckpt
from ckpt.device_check import DeviceCheck, check_devices
from ckpt.upkeep import machine

__all__ = ["cuda", "fake_library", "training"]
pytestmark = both_drivers


def assert_raced(cuda: FakeCuda, checks: int) -> None:
    """A check lets a copy and a write race, each with the other: what must go wrong. Nothing else may."""
    found = cuda.violations()
    assert len(found) >= 2 * checks if cuda.is_strict else not found, found  # more, where a thread came late
    assert all("race" in each and "cuMemsetD8Async" in each and "cuMemcpyDtoHAsync" in each for each in found)


@pytest.fixture(params=[0.0, 0.003], ids=["prompt", "late"])
def delayed(request: pytest.FixtureRequest, cuda: FakeCuda, training: Training) -> Iterator[FakeCuda]:
    cuda.configure(seed=5, most_delay_s=request.param)
    yield cuda
    cuda.configure()


def only(found: list[DeviceCheck]) -> DeviceCheck:
    assert len(found) == 1
    return found[0]


def test_a_device_that_keeps_order(delayed: FakeCuda) -> None:
    before = delayed.alive()
    for _ in range(3):
        assert [(each.device, each.verdict, each.reason) for each in check_devices([0, 1], timeout_s=60)] == [
            (0, "passed", ""),
            (1, "passed", ""),
        ]
        assert_raced(delayed, 2)
    assert delayed.alive() == before


def test_waits_that_do_not_work(delayed: FakeCuda) -> None:
    delayed.set_order("without waits")
    found = only(check_devices(timeout_s=60))
    assert (found.device, found.verdict) == (0, "failed")
    first = "a copy overtook a write that it had to wait for, on the default stream"
    second = "a write overtook a copy that it had to wait for, on the default stream"  # first, if a thread came late
    assert found.reason in (first, second)


def test_streams_that_wait_for_each_other_anyway(delayed: FakeCuda) -> None:
    """Then that the waits were kept shows nothing."""
    delayed.set_order("one queue")
    found = only(check_devices(timeout_s=60))
    assert found.verdict == "inconclusive" and "so nothing shows that waiting for an event works" in found.reason
    delayed.violations()  # of the one that was found, or of both


@pytest.mark.usefixtures("training")
def test_a_device_that_hangs(cuda: FakeCuda) -> None:
    before = cuda.alive()
    cuda.hold_copies(True)
    found = only(check_devices(timeout_s=0.3))
    assert (found.verdict, found.reason) == ("late", "the device has not done it within 0.3 s")
    assert cuda.alive() != before  # what the device may still write to is not given back
    cuda.before = {**cuda.alive()}
    cuda.hold_copies(False)


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize(
    "call", ["cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuLaunchHostFunc", "cuMemsetD8Async", "cuEventRecord"]
)
def test_a_call_that_is_refused(call: str, cuda: FakeCuda) -> None:
    cuda.fail(call, skip=1)
    found = only(check_devices(timeout_s=60))
    assert found.verdict == "failed" and "CUDA_ERROR_ILLEGAL_ADDRESS" in found.reason
    if call == "cuMemcpyHtoDAsync":
        assert_raced(cuda, 1)
    cuda.before = {**cuda.alive()}  # it may be in use


@pytest.mark.usefixtures("training")
def test_work_that_fails(cuda: FakeCuda) -> None:
    cuda.fail("cuMemcpyDtoHAsync", late=True, code=ILLEGAL_ADDRESS)
    assert only(check_devices(timeout_s=60)).verdict == "failed"
    cuda.before = {**cuda.alive()}


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize(
    ("call", "reason"), [("cuMemHostRegister", "host memory cannot be pinned"), ("cuMemAlloc", "out of memory")]
)
def test_no_memory(call: str, reason: str, cuda: FakeCuda) -> None:
    before = cuda.alive()
    cuda.fail(call, code=2)
    found = only(check_devices(timeout_s=60))
    assert found.verdict == "failed" and reason in found.reason
    assert cuda.alive() == before


@pytest.mark.usefixtures("training")
def test_while_a_graph_is_captured(cuda: FakeCuda) -> None:
    before = cuda.alive()
    stream = (
        cuda.stream(0) if cuda.is_strict and not cuda.is_proxy else DEFAULT_STREAM
    )  # which cannot be captured itself, but for the other stand-in
    cuda.set_capturing(0, stream, True)
    found = only(check_devices(timeout_s=60))
    assert (found.verdict, found.reason) == ("inconclusive", "a graph is being captured")
    cuda.set_capturing(0, stream, False)
    cuda.fail("cuStreamIsCapturing", code=906)
    assert only(check_devices(timeout_s=60)).verdict == "inconclusive"
    assert cuda.alive() == before


def test_saves_go_on_meanwhile(training: Training, cuda: FakeCuda, tmp_path: Any) -> None:
    saved = {"weight": torch.arange(300_000.0)}
    training.placed(saved["weight"])
    with ckpt.Checkpointer(tmp_path, options=ckpt.Options(device_lazy=True), coordinator="local") as checkpointer:
        pending = checkpointer.save(1, saved, lazy=True)
        assert only(check_devices(timeout_s=60)).verdict == "passed"
        assert torch.equal(ckpt.load(pending.result(60) / "state.pt")["weight"], saved["weight"])
    assert_raced(cuda, 1)


@pytest.mark.usefixtures("training")
def test_the_doctor_asks_each(shell: Shell, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DRIVER", cuda.path)
    found = {each["what"]: each for each in shell.json("doctor")["findings"]}
    assert found["CUDA driver"]["found"].endswith(", 2 devices")
    assert [found[f"CUDA device {number}"]["verdict"] for number in (0, 1)] == ["good", "good"]
    assert_raced(cuda, 2)
    cuda.set_order("without waits")
    found = {each["what"]: each for each in shell.json("doctor", code=1)["findings"]}
    assert found["CUDA device 1"]["verdict"] == "bad" and "overtook" in found["CUDA device 1"]["found"]
    assert "device_lazy=False" in found["CUDA device 1"]["remedy"]
    cuda.violations()


@pytest.mark.usefixtures("fake_library")
def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        with pytest.raises(ckpt.errors.DeviceError, match="knows no CUDA devices"):
            check_devices()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    if not torch.cuda.is_available():
        with pytest.raises(ckpt.errors.DeviceError, match="the CUDA driver"):
            check_devices()
    with pytest.raises(ValueError, match="timeout_s must be a positive number"):
        check_devices(timeout_s=0)


@pytest.mark.usefixtures("training")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ckpt.errors.DeviceError, match="cuDeviceGet"):
        check_devices([7])
