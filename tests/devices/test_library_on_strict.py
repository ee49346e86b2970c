"""What the library promises, where only the strict model of the driver tells whether it keeps it: whatever the timing."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from device_rig import EAGER, HOST, LAZY, MIB, Make, Rig, Saved, cuda, fake_library, make
from device_training import Training, options, state, training
from fake_driver import ILLEGAL_ADDRESS, FakeCuda
from support import DEADLINE_S, assert_same, wait_until

import ckpt
from ckpt.errors import DeviceError

__all__ = ["cuda", "fake_library", "make", "training"]
pytestmark = pytest.mark.parametrize("fake_library", ["strict"], indirect=True)


def ready(make: Make, cache: int = 0) -> Rig:
    rig = make(device_cache_bytes=cache)
    if cache:
        rig.warm_up()
    else:
        rig.check(rig.save([10, 10], [LAZY, LAZY], [0, 1]))
    rig.engine.fence(rig.streams)
    return rig


def fill(rig: Rig, saved: Saved, stream: int) -> None:
    """What trains knows no more than streams and events tell it."""
    for tensor in saved.tensors:
        rig.cuda.fill(0, stream, tensor.data_ptr(), 0xEE, len(tensor), told=False)


@pytest.mark.parametrize("cache", [0, 4 * MIB])
def test_a_fence_orders_its_stream(make: Make, cuda: FakeCuda, cache: int) -> None:
    rig = ready(make, cache)
    cuda.hold_copies(True)
    saved = rig.save([500_000], [LAZY], [0])
    rig.engine.fence(rig.streams)
    fill(rig, saved, rig.streams[0])
    cuda.hold_copies(False)
    rig.check(saved)


@pytest.mark.parametrize("cache", [0, 4 * MIB])
def test_a_second_fence_orders_its_stream_too(make: Make, cuda: FakeCuda, cache: int) -> None:
    rig = ready(make, cache)
    cuda.hold_copies(True)
    saved = rig.save([500_000], [LAZY], [0])
    rig.engine.fence(rig.streams)
    second = cuda.stream(0)
    rig.engine.fence({0: second})
    fill(rig, saved, second)
    cuda.hold_copies(False)
    rig.check(saved)


def test_without_a_fence_nothing_is_ordered(make: Make, cuda: FakeCuda) -> None:
    rig = ready(make)
    cuda.hold_copies(True)
    saved = rig.save([50_000], [LAZY], [0])
    wait_until(lambda: saved.job.captured)
    fill(rig, saved, rig.streams[0])
    assert "race" in cuda.violations()[0]
    cuda.hold_copies(False)
    rig.engine.fence(rig.streams)
    assert saved.job.wait_finished(DEADLINE_S)


def neighbours(count: int, size: int) -> list[torch.Tensor]:
    """Tensors that lie side by side, each in an allocation of its own."""
    memory = np.random.default_rng(0).integers(0, 256, count * size, dtype=np.uint8)
    return [torch.from_numpy(part) for part in np.split(memory, count)]


@pytest.mark.parametrize("kind", [LAZY, EAGER])
@pytest.mark.parametrize("size", [100, 4096])
def test_copies_do_not_join_allocations(make: Make, cuda: FakeCuda, kind: int, size: int) -> None:
    """Eager bytes that share a chunk with lazy ones lie close together in the file, too."""
    rig = ready(make)
    tensors = [*neighbours(50, size), torch.randint(0, 256, (3000,), dtype=torch.uint8)]
    try:
        rig.check(rig.save([], [kind] * 50 + [LAZY], [0] * 51, tensors=tensors))
    finally:
        cuda.assert_no_violation()


@pytest.mark.parametrize(("count", "size"), [(60, 65536), (900, 500)])
def test_copies_to_a_cache_do_not_join_allocations(make: Make, cuda: FakeCuda, count: int, size: int) -> None:
    rig = make(arena_bytes=512 << 10, device_cache_bytes=4 * MIB, device_window_bytes=0)
    rig.warm_up()
    cuda.hold_copies(True)
    saved = rig.save([], [LAZY] * count, [0] * count, tensors=neighbours(count, size))
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    cuda.hold_copies(False)
    rig.check(saved)
    assert saved.job.stats["device_cached_bytes"] > 0
    cuda.assert_no_violation()


@pytest.mark.parametrize("size", [100, 4096, 64])
def test_loads_do_not_join_allocations(training: Training, tmp_path: Path, size: int) -> None:
    state, target = ({str(i): part for i, part in enumerate(neighbours(50, size))} for _ in range(2))
    for part in target.values():
        part.fill_(0)
    torch.save(state, tmp_path / "a.pt")
    ckpt.load_into(tmp_path / "a.pt", target)
    training.synchronize()
    training.cuda.assert_no_violation()
    assert_same(state, target)


def test_a_fence_on_another_stream_than_the_last_one(training: Training, tmp_path: Path) -> None:
    current = state()
    how = options(arena_bytes="8MiB")
    ckpt.save(current, tmp_path / "a.pt", lazy=True, options=how).result(30)
    training.cuda.hold_copies(True)
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=how)
    ckpt.fence()
    training.streams[0] = training.cuda.stream(0)
    ckpt.fence()
    for value in current.values():
        if isinstance(value, torch.Tensor):
            training.fill(value, 0xEE)
    violations = training.cuda.violations()
    training.cuda.hold_copies(False)
    training.synchronize()
    file = torch.load(pending.result(30))
    assert not violations, violations
    assert_same(state(), file)


# ---- captures --------------------------------------------------------------------------------------------------------


@contextmanager
def capture_elsewhere(cuda: FakeCuda, device: int = 0) -> Iterator[None]:
    """Another thread captures a stream of its own, in the mode that torch.cuda.graph() has by default."""
    stream, begun, end = cuda.stream(device), threading.Event(), threading.Event()

    def capture() -> None:
        cuda.set_capturing(device, stream, True)
        begun.set()
        end.wait(DEADLINE_S)
        cuda.set_capturing(device, stream, False)

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait(DEADLINE_S)
    try:
        yield
    finally:
        end.set()
        thread.join(DEADLINE_S)


@pytest.mark.parametrize("warm", [True, False], ids=["another_save", "the_first_save"])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("cache", [0, 4 * MIB])
def test_a_save_breaks_no_capture_of_another_thread(
    make: Make, cuda: FakeCuda, warm: bool, verify: bool, cache: int
) -> None:  # fmt: skip
    rig = ready(make, cache) if warm else make(device_cache_bytes=cache)
    with capture_elsewhere(cuda):
        saved = rig.save([500_000, 10, 3000], [LAZY, LAZY, EAGER], [0, 1, 0], verify=verify)
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, LAZY)
        rig.check(saved)
        cuda.assert_no_violation()
        if cache and warm:  # it is taken at the second save
            wait_until(lambda: all(size or why for size, _, why in rig.engine.device_caches.values()), what="the caches")


def test_an_engine_that_ends_breaks_no_capture_of_another_thread(cuda: FakeCuda, tmp_path: Path) -> None:
    rig = Rig(cuda, tmp_path, device_cache_bytes=4 * MIB)
    rig.warm_up()
    with capture_elsewhere(cuda):
        assert rig.engine.close(DEADLINE_S)
        rig.engine = None
        gc.collect()
    cuda.assert_no_violation()


@pytest.mark.parametrize("how", ["load", "load_into"])
def test_a_load_breaks_no_capture_of_another_thread(training: Training, tmp_path: Path, how: str) -> None:
    torch.save(state(), tmp_path / "a.pt")
    target = state(0.0)
    with capture_elsewhere(training.cuda):
        if how == "load":
            target = ckpt.load(tmp_path / "a.pt", map_location="cuda:0")
        else:
            ckpt.load_into(tmp_path / "a.pt", target)
    violations = training.cuda.violations()
    training.synchronize()
    assert training.cuda.count("cuMemcpyHtoDAsync") + training.cuda.count("cuMemcpyBatchAsync") > 0
    assert_same(state(), target)
    assert not violations, violations


def test_memory_is_handed_on_while_nothing_reads_it(training: Training, tmp_path: Path) -> None:
    """Tensors end as soon as the library has let go of them, and others take their memory."""
    for turn in range(12):
        current = state(float(turn))
        pending = ckpt.save(current, tmp_path / f"{turn}.pt", lazy=turn % 2 == 0, options=options())
        ckpt.fence()
        del current
        if turn % 3 == 0:
            assert_same(state(float(turn)), torch.load(pending.result(30)))
    pending.result(30)
    training.cuda.assert_no_violation()


@pytest.mark.parametrize("fenced", [True, False])
def test_a_replay_after_a_fence_is_in_order(make: Make, cuda: FakeCuda, fenced: bool) -> None:
    rig = ready(make)
    tensor = torch.zeros(50_000, dtype=torch.uint8)
    stream, replayed = rig.streams[0], ctypes.c_void_p(rig.streams[0])
    cuda.own(0, tensor.untyped_storage())
    cuda.set_capturing(0, stream, True)
    cuda.fill(0, stream, tensor.data_ptr(), 7, len(tensor))
    cuda.set_capturing(0, stream, False)
    cuda.hold_copies(True)
    saved = rig.save([], [LAZY], [0], tensors=[tensor])
    wait_until(lambda: saved.job.captured)
    if fenced:
        rig.engine.fence(rig.streams)
    cuda.cu.fake_replay(0, replayed, replayed)
    violations = cuda.violations()
    assert bool(violations) != fenced, violations
    cuda.hold_copies(False)
    rig.engine.fence(rig.streams)
    assert saved.job.wait_finished(DEADLINE_S)


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_an_operation_that_fails_ends_its_device_and_no_other(make: Make, cuda: FakeCuda) -> None:
    """Whose context never works again. Each save of it says so; others go on, and the engine ends."""
    rig = ready(make)
    cuda.cu.fake_fail(b"cuMemcpyDtoHAsync", ctypes.c_int64(1), ILLEGAL_ADDRESS, 1)
    bad = rig.save([500_000], [LAZY], [0])
    assert bad.job.wait_finished(DEADLINE_S)
    assert isinstance(bad.job.error, DeviceError) and "CUDA_ERROR_ILLEGAL_ADDRESS" in str(bad.job.error)
    assert bad.job.released and not bad.path.exists()
    for kind in (LAZY, EAGER):
        with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            rig.save([1000], [kind], [0])
    rig.engine.fence(rig.streams)
    good = rig.save([500_000, 1000, 1000], [LAZY, EAGER, EAGER], [1, 1, HOST])
    rig.engine.fence({1: rig.streams[1]})
    rig.overwrite(good, LAZY)
    rig.check(good)
    assert rig.engine.close(DEADLINE_S)
    cuda.configure()


def test_an_engine_ends_after_the_driver(cuda: FakeCuda, tmp_path: Path) -> None:
    """As at the end of a process: there is nothing left to give back."""
    rig = Rig(cuda, tmp_path)
    rig.check(rig.save([500_000, 10], [LAZY, EAGER], [0, 1]))
    cuda.cu.fake_shut_down()
    assert rig.engine.close(DEADLINE_S)
    rig.engine = None
    gc.collect()
    cuda.configure()
    cuda.assert_no_violation()
    cuda.before = cuda.alive()
