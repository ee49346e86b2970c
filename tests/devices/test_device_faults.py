"""What goes wrong on the way from a device to a file: it fails a save and no other, and nothing is left behind."""

from __future__ import annotations

import ctypes.util
import gc
import time
from pathlib import Path

import pytest
from device_rig import EAGER, HOST, LAZY, MIB, Make, Rig, cuda, fake_library, make
from fake_driver import FakeCuda
from support import DEADLINE_S, patience, wait_until

from ckpt.errors import DeadlineError, DeviceError

__all__ = ["cuda", "fake_library", "make"]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_a_copy_that_fails_fails_its_job_only(make: Make, cuda: FakeCuda, late: bool) -> None:
    rig = make()
    before = rig.save([500_000], [LAZY], [0])
    rig.check(before)
    cuda.fail("cuMemcpyDtoHAsync", skip=3, late=late)
    bad = rig.save([500_000], [LAZY], [0])
    assert bad.job.wait_finished(DEADLINE_S)
    error = bad.job.error
    assert isinstance(error, DeviceError)
    for part in (str(bad.path), "device 0", "CUDA_ERROR_ILLEGAL_ADDRESS", "700", "CUDA_LAUNCH_BLOCKING=1"):
        assert part in str(error)
    assert bad.job.captured and bad.job.released and not bad.path.exists()
    after = rig.save([500_000, 10], [LAZY, EAGER], [0, 1])
    rig.engine.fence(rig.streams)
    rig.overwrite(after, LAZY)
    rig.check(after)


CALLS = ["cuMemcpyDtoHAsync", "cuEventRecord", "cuEventCreate", "cuCtxGetCurrent", "cuStreamIsCapturing", "cuStreamWaitEvent"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [LAZY, EAGER])
def test_any_call_may_fail(make: Make, cuda: FakeCuda, call: str, kind: int) -> None:
    """Whoever learns of it, the next save is as good as ever."""
    cuda.configure(most_delay_s=0.001)
    rig = make()
    rig.check(rig.save([10], [LAZY], [0]))
    struck = 0
    for skip in range(6):
        cuda.fail(call, skip=skip, code=2)
        try:
            saved = rig.save([200_000, 150_000], [kind, kind], [0, 1])
            assert saved.job.wait_finished(DEADLINE_S)
            error = saved.job.error
        except DeviceError as raised:
            error = raised
        if error is not None:
            struck += 1
            assert "CUDA_ERROR_OUT_OF_MEMORY" in str(error)
        else:
            rig.check(saved)
        cuda.configure(most_delay_s=0.001)
        wait_until(lambda: rig.engine.in_flight == 0)
        again = rig.save([200_000, 150_000], [kind, kind], [0, 1])
        rig.check(again)
    assert struck or (call, kind) == ("cuStreamWaitEvent", EAGER)
    assert sorted(path.name for path in rig.directory.iterdir() if path.stat().st_size == 0) == []


def test_an_eager_copy_that_fails_is_raised(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.check(rig.save([10], [EAGER], [0]))
    cuda.fail("cuMemcpyDtoHAsync", code=2)
    with pytest.raises(DeviceError, match=r"save-2.*cuMemcpyDtoHAsync on CUDA device 0 failed with CUDA_ERROR_OUT_OF_MEMORY"):
        rig.save([100_000], [EAGER], [0])
    wait_until(lambda: rig.engine.in_flight == 0)
    assert not (rig.directory / "save-2").exists()


@pytest.mark.parametrize("skip", [0, 2], ids=["the lane", "its thread"])
@pytest.mark.parametrize("second", [False, True], ids=["the first", "the second"])
def test_a_lane_that_cannot_start_takes_no_copies(make: Make, cuda: FakeCuda, second: bool, skip: int) -> None:
    """Nobody would see them end. The next save tries again."""
    rig = make()
    if second:
        rig.engine.open_devices([0])
        wait_until(lambda: rig.engine.arena_pinned)
    cuda.fail("cuThreadExchangeStreamCaptureMode", skip=skip, code=2)
    with pytest.raises(DeviceError, match=r"cuThreadExchangeStreamCaptureMode.*CUDA_ERROR_OUT_OF_MEMORY"):
        rig.save([200_000, 150_000], [EAGER, EAGER], [0, 1])
    assert rig.engine.in_flight == 0 and not (rig.directory / "save-1").exists()
    saved = rig.save([200_000, 150_000], [EAGER, LAZY], [0, 1])
    rig.check(saved)
    assert saved.job.stats["arena_pinned"]


def test_a_thread_that_cannot_pin(make: Make, cuda: FakeCuda) -> None:
    """Then all is copied inside save()."""
    rig = make()
    cuda.fail("cuThreadExchangeStreamCaptureMode", skip=3, code=2)
    rig.engine.open_devices([0])
    wait_until(lambda: rig.engine.pin_failure)
    assert "cuThreadExchangeStreamCaptureMode" in rig.engine.pin_failure
    saved = rig.save([200_000], [LAZY], [0])
    rig.overwrite(saved, LAZY)  # without a fence
    rig.check(saved)
    assert not saved.job.stats["arena_pinned"]


def test_a_stream_under_capture_is_refused(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.engine.fence(rig.streams)
    stream = rig.streams[0]
    cuda.hold_copies(True)
    saved = rig.save([100_000], [LAZY], [0])
    cuda.set_capturing(0, stream, True)
    with pytest.raises(
        DeviceError, match=r"captured into a graph.*ckpt\.fence\(\) before a capture begins and before each replay"
    ):
        rig.save([100_000], [LAZY], [0])
    with pytest.raises(DeviceError, match=r"ckpt\.fence\(\)"):
        rig.engine.fence(rig.streams)
    assert not (rig.directory / "save-2").exists()
    cuda.hold_copies(False)
    rig.check(saved)
    rig.engine.fence(rig.streams)  # nothing is in flight: nothing to refuse
    cuda.set_capturing(0, stream, False)


def test_no_driver(tmp_path: Path, cuda: FakeCuda) -> None:
    for library, cause in ((str(tmp_path / "none.so"), "none.so"), (ctypes.util.find_library("m") or "", "no cuInit")):
        rig = Rig(cuda, tmp_path, cuda_library=library, streams={0: 0})
        with pytest.raises(DeviceError, match=rf"CUDA driver.*{cause}.*no CUDA tensor can be saved.*NVIDIA driver"):
            rig.save([10], [LAZY], [0])
        assert not (tmp_path / "save-1").exists()
        host = rig.save([100_000, 10], [LAZY, EAGER], [HOST, HOST])
        rig.engine.fence({0: 0})
        rig.check(host)
        host.path.unlink()
        rig.end()


def test_no_device(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(devices=0)
    with pytest.raises(DeviceError, match=r"sees no device.*CUDA_VISIBLE_DEVICES"):
        make().save([10], [LAZY], [0])


def test_a_device_that_is_not_there_or_not_named(make: Make) -> None:
    rig = make()
    with pytest.raises(DeviceError, match=r"cuDeviceGet on CUDA device 5"):
        rig.save([10], [LAZY], [5], streams={5: 0})
    with pytest.raises(DeviceError, match=r"no stream was given for CUDA device 1"):
        rig.save([10], [LAZY], [1], streams={0: 0})


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_copy_that_hangs_fails_its_job_at_the_deadline(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.engine.open_devices([0])
    wait_until(lambda: rig.engine.arena_pinned)
    cuda.hold_copies(True)
    saved = rig.save([100_000], [LAZY], [0], timeout_s=0.2)
    wait_until(lambda: saved.job.error is not None)
    error = saved.job.error
    assert isinstance(error, DeadlineError)
    assert "CUDA device 0 did not end within 0.2" in str(error)
    assert saved.job.captured and not saved.job.released and not saved.job.finished  # its memory is still being written to
    cuda.hold_copies(False)
    assert saved.job.wait_finished(DEADLINE_S) and saved.job.released
    assert not saved.path.exists()


@pytest.mark.parametrize("hangs", [0, 1])
def test_looking_at_bytes_of_a_device_that_hangs_ends_at_the_deadline(make: Make, cuda: FakeCuda, hangs: int) -> None:
    """What verify_capture copies first. submit() returns, and the memory that is still being written to stays."""
    rig = make()
    rig.engine.open_devices([0, 1])
    wait_until(lambda: rig.engine.arena_pinned)
    rig.check(rig.save([10, 10], [LAZY, LAZY], [0, 1], verify=True))
    cuda.hold_copies(True)
    saved = rig.save([200_000, 50], [LAZY, LAZY], [hangs, HOST], verify=True, timeout_s=0.2)
    assert isinstance(saved.job.error, DeadlineError)
    for part in (str(saved.path), f"CUDA device {hangs} did not end within 0.2", "nvidia-smi"):
        assert part in str(saved.job.error)
    assert saved.job.captured and not saved.job.released and not saved.job.finished
    other = rig.save([100_000], [LAZY], [1 - hangs], timeout_s=DEADLINE_S)
    cuda.hold_copies(False)
    assert saved.job.wait_finished(DEADLINE_S) and saved.job.released
    assert not saved.path.exists()
    rig.check(other)
    again = rig.save([200_000, 50_000, 3], [LAZY, LAZY, EAGER], [hangs, 1 - hangs, hangs], verify=True)
    rig.engine.fence(rig.streams)
    rig.overwrite(again, LAZY)
    rig.check(again)


def test_an_engine_whose_look_hangs_is_left_alone(cuda: FakeCuda, tmp_path: Path) -> None:
    """The memory of the copies leaks with the engine, and stays pinned."""
    rig = Rig(cuda, tmp_path)
    rig.check(rig.save([10], [LAZY], [0], verify=True))
    cuda.hold_copies(True)
    saved = rig.save([100_000], [LAZY], [0], verify=True, timeout_s=0.1)
    assert isinstance(saved.job.error, DeadlineError)
    rig.engine = None
    gc.collect()
    assert cuda.alive()["registrations"] == cuda.before["registrations"] + 2
    cuda.hold_copies(False)
    assert saved.job.wait_finished(DEADLINE_S)
    # The lane lets go of it a little later; a following test would see that.
    wait_until(lambda: cuda.alive()["registrations"] == cuda.before["registrations"] + 1)
    cuda.synchronize(0, rig.streams[0])
    cuda.before = cuda.alive()


def test_what_is_looked_at_need_not_be_pinned(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.check(rig.save([10], [LAZY], [0]))
    cuda.fail("cuMemHostRegister", code=2)
    saved = rig.save([90_000] * 5, [LAZY] * 5, [0, 1, 0, 1, 0], verify=True)
    assert cuda.count("pageable copies") > 0
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)


def test_a_fence_gives_up_on_a_device_that_it_was_not_named(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.check(rig.save([10, 10], [LAZY, LAZY], [0, 1]))
    cuda.hold_copies(True)
    saved = rig.save([100_000], [LAZY], [1], timeout_s=0.2)
    rig.engine.fence({0: rig.streams[0]})
    assert isinstance(saved.job.error, DeadlineError) and "CUDA device 1 did not end within 0.2" in str(saved.job.error)
    cuda.hold_copies(False)


def test_close_gives_up_on_copies_that_hang(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.engine.open_devices([0])
    wait_until(lambda: rig.engine.arena_pinned)
    cuda.hold_copies(True)
    saved = rig.save([100_000], [LAZY], [0])
    begin = time.monotonic()
    assert not rig.engine.close(0.1)
    assert time.monotonic() - begin < patience(10)
    assert isinstance(saved.job.error, DeadlineError) and rig.engine.in_flight == 1
    cuda.hold_copies(False)
    assert saved.job.wait_released(DEADLINE_S)
    wait_until(lambda: rig.engine.in_flight == 0)


def test_an_engine_that_goes_away_with_copies_in_flight_is_left_alone(cuda: FakeCuda, tmp_path: Path) -> None:
    """Its arena is being written to: it must stay mapped. So it leaks, and what the driver gave it with it."""
    rig = Rig(cuda, tmp_path)
    rig.check(rig.save([10], [LAZY], [0]))
    cuda.hold_copies(True)
    saved = rig.save([100_000], [LAZY], [0])
    rig.engine.fence(rig.streams)
    rig.engine = None
    gc.collect()
    cuda.hold_copies(False)
    rig.check(saved)
    cuda.before = cuda.alive()
    assert cuda.before["registrations"] >= 1


def test_an_engine_ends_while_it_is_being_prepared(cuda: FakeCuda, tmp_path: Path) -> None:
    for _ in range(5):
        rig = Rig(cuda, tmp_path, arena_bytes=64 * MIB, streams={})
        rig.engine.open_devices([0, 1])
        rig.end()
