"""Copies from devices: one for each tensor, of which many small ones may take one call of the driver."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import fake_driver
import pytest
import torch
from choice import mostly_slow
from device_rig import EAGER, KIB, LAZY, Make, Rig, cuda, fake_library, make
from fake_driver import DEFAULT_STREAM, FakeCuda, both_drivers
from support import DEADLINE_S, wait_until

from ckpt.errors import DeviceError

__all__ = ["cuda", "fake_library", "make"]
pytestmark = both_drivers

SMALL = [1 + number % 300 for number in range(400)]
DEVICES = [number % 2 for number in range(400)]
MANY = 4 * 64 * KIB  # what fits a chunk of the rigs here
BATCHES: dict[str, Any] = {"chunk_bytes": MANY, "device_batches": True}
MOST = 256  # copies in one call
REFUSED = [(LAZY, 0), (EAGER, 1), (LAZY, 177), (EAGER, 399)]  # the kind, and how many copies had been enqueued


@pytest.fixture(scope="module")
def old_library(fake_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver of before batches."""
    kind = next(kind for kind, source in fake_driver.SOURCES.items() if source.stem == fake_library.stem.removeprefix("lib"))
    return fake_driver.build(tmp_path_factory.mktemp("old_cuda"), "-DWITHOUT_BATCHES", kind=kind)


@pytest.fixture
def old_cuda(old_library: Path) -> Iterator[FakeCuda]:
    with fake_driver.loaded(old_library) as fake:
        yield fake


def calls(cuda: FakeCuda) -> tuple[int, int, int]:
    """Calls for one copy, calls for many, and the copies of these."""
    return cuda.count("cuMemcpyDtoHAsync"), cuda.count("cuMemcpyBatchAsync"), cuda.count("batched copies")


def save_small(rig: Rig, kind: int = LAZY, devices: list[int] = DEVICES) -> None:
    """Two rounds; what computes writes to the tensors as soon as it may."""
    for _ in range(2):
        saved = rig.save(SMALL, [kind] * 400, devices)
        if kind == LAZY:
            rig.engine.fence(rig.streams)
        rig.overwrite(saved, kind)
        rig.check(saved)


def ready(rig: Rig) -> Rig:
    """Copies to memory that is not pinned yet are made one by one."""
    rig.engine.open_devices([0, 1])
    wait_until(lambda: rig.engine.arena_pinned)
    return rig


@pytest.mark.parametrize("kind", [LAZY, EAGER])
def test_they_are_no_default(make: Make, cuda: FakeCuda, kind: int) -> None:
    save_small(ready(make(chunk_bytes=MANY)), kind)
    assert calls(cuda) == (800, 0, 0)


@pytest.mark.parametrize("count", [MOST, MOST + 1, 2 * MOST, 2 * MOST + 1])
def test_a_call_has_so_many_copies_at_most(make: Make, cuda: FakeCuda, count: int) -> None:
    rig = ready(make(**BATCHES))
    saved = rig.save([100] * count, [LAZY] * count, [0] * count)
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)
    assert calls(cuda) == (0, -(-count // MOST), count)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [LAZY, EAGER])
def test_small_tensors_of_a_chunk_take_one_call(make: Make, cuda: FakeCuda, kind: int, seed: int) -> None:
    cuda.configure(seed=seed, most_delay_s=0.0001)
    rig = ready(make(**BATCHES))
    save_small(rig, kind)
    assert calls(cuda) == (0, 4, 800), "one for each save and device"


@pytest.mark.parametrize("kind", [LAZY, EAGER])
def test_a_driver_without_batches(old_cuda: FakeCuda, tmp_path: Path, kind: int) -> None:
    rig = ready(Rig(old_cuda, tmp_path, **BATCHES))
    save_small(rig, kind)
    assert not hasattr(old_cuda.cu, "cuMemcpyBatchAsync")
    assert calls(old_cuda) == (800, 0, 0)
    rig.end()


@pytest.mark.parametrize(("kind", "enqueued"), mostly_slow(product((LAZY, EAGER), (0, 1, 177, 399)), REFUSED))
def test_a_batch_that_is_refused_is_copied_one_by_one(make: Make, cuda: FakeCuda, enqueued: int, kind: int) -> None:
    """Whatever of it had been enqueued. That device's later copies are not tried in batches again."""
    rig = ready(make(**BATCHES))
    cuda.fail("batched copies", skip=enqueued, code=801)
    save_small(rig, kind, [0] * 400)
    before = enqueued // MOST * MOST  # by calls that were not refused
    expected = 800 - before, enqueued // MOST + 1, enqueued + 1
    assert calls(cuda) == expected
    save_small(rig, kind, [1] * 400)
    assert calls(cuda) == (expected[0], expected[1] + 4, expected[2] + 800), "the other device goes on with them"


def test_a_driver_that_refuses_all_batches(make: Make, cuda: FakeCuda) -> None:
    rig = ready(make(**BATCHES))
    for _ in range(3):
        cuda.fail("cuMemcpyBatchAsync", code=801)
    save_small(rig)
    assert calls(cuda) == (800, 2, 0), "each device asks once"


def test_a_batch_that_fails_on_its_way_fails_its_job(make: Make, cuda: FakeCuda) -> None:
    rig = ready(make(**BATCHES))
    cuda.fail("batched copies", skip=50, late=True)
    bad = rig.save(SMALL, [LAZY] * 400, DEVICES)
    assert bad.job.wait_finished(DEADLINE_S)
    assert isinstance(bad.job.error, DeviceError) and "ILLEGAL_ADDRESS" in str(bad.job.error)
    save_small(rig)
    assert cuda.count("cuMemcpyDtoHAsync") == 0


def test_eager_copies_on_the_default_stream_are_made_one_by_one(make: Make, cuda: FakeCuda) -> None:
    """Batches are refused there; those on the engine's own streams go on."""
    rig = ready(make(**BATCHES, streams={0: DEFAULT_STREAM, 1: DEFAULT_STREAM}))
    save_small(rig, EAGER)
    assert calls(cuda) == (800, 0, 0)
    save_small(rig, LAZY)
    assert calls(cuda) == (800, 4, 800)


def test_no_batches_to_memory_that_is_not_pinned(make: Make, cuda: FakeCuda) -> None:
    cuda.fail("cuMemHostRegister", code=2)
    save_small(make(**BATCHES))
    assert calls(cuda) == (800, 0, 0)


def test_neighbours_are_copied_one_by_one(make: Make, cuda: FakeCuda) -> None:
    """Eager bytes that share a chunk with lazy ones lie close together. What lies so on a device, too, may be two allocations:
    a copy of both is refused."""
    rig = ready(make(**BATCHES))
    buffer = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    for begin, length in ((0, 2000), (2000, 3000)):
        cuda.allocated(buffer.data_ptr() + begin, length)
    tensors = [*buffer.split(100), torch.randint(0, 256, (3000,), dtype=torch.uint8)]
    try:
        saved = rig.save([], [EAGER] * 50 + [LAZY], [0] * 51, tensors=tensors)
        rig.overwrite(saved, EAGER)
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, LAZY)
        rig.check(saved)
    finally:
        for begin in (0, 2000):
            cuda.allocated(buffer.data_ptr() + begin, 0)
    single, _, batched = calls(cuda)
    assert single + batched == 51


# ---- to the cache of a device ----------------------------------------------------------------------------------------


def with_cache(rig: Rig) -> Rig:
    """Of which the lane has two chunks under way when the fence comes: the rest waits in the cache."""
    rig = ready(rig)
    rig.warm_up()
    return rig


def save_through_cache(rig: Rig, cuda: FakeCuda, device: int = 0, refused: int | None = None) -> tuple[int, int]:
    """A fence with copies of the lane held up. Returns how many calls it took for one copy, and for many.

    Args:
        refused: after so many copies the call for many is refused.
    """
    # Not all batches: at a fence the lane may go on with those of its own, to the host.
    calls = ("cuMemcpyDtoDAsync", "batches on a device")
    cuda.hold_copies(True)
    saved = rig.save([3 * MANY, *SMALL], [LAZY] * 401, [device] * 401)
    wait_until(lambda: rig.engine.arena_used >= 2 * MANY, what="two chunks under way")
    before = [cuda.count(call) for call in calls]
    if refused is not None:
        cuda.fail("copies batched on a device", skip=refused, code=801)  # no fault for the lane's own to the host
    rig.engine.fence(rig.streams)
    single, many = [cuda.count(call) - was for call, was in zip(calls, before, strict=True)]
    assert saved.job.captured and saved.job.stats["device_cached_bytes"] > sum(SMALL)
    rig.overwrite(saved, LAZY)
    cuda.hold_copies(False)
    rig.check(saved)
    return single, many


CACHE: dict[str, Any] = BATCHES | {"device_cache_bytes": 16 * MANY, "device_window_bytes": 0}


@pytest.mark.parametrize("seed", range(3))
def test_small_tensors_go_to_the_cache_in_two_calls(make: Make, cuda: FakeCuda, seed: int) -> None:
    cuda.configure(seed=seed, most_delay_s=0.0001)
    rig = with_cache(make(**CACHE))
    for device in (0, 1, 0):
        assert save_through_cache(rig, cuda, device) == (0, 2)
    assert cuda.count("cuMemcpyDtoHAsync") + cuda.count("cuMemcpyBatchAsync") < 40, "out of it, too"


@pytest.mark.parametrize("enqueued", [0, 1, 177])
def test_a_batch_to_the_cache_that_is_refused_is_copied_one_by_one(make: Make, cuda: FakeCuda, enqueued: int) -> None:
    rig = with_cache(make(**CACHE))
    single, many = save_through_cache(rig, cuda, refused=enqueued)
    assert single > 400 and many == 1
    single, many = save_through_cache(rig, cuda)
    assert single > 400 and many == 0, "it is not tried again"
    assert save_through_cache(rig, cuda, 1) == (0, 2), "the other device goes on with them"


def test_the_cache_with_a_driver_without_batches(old_cuda: FakeCuda, tmp_path: Path) -> None:
    rig = with_cache(Rig(old_cuda, tmp_path, **CACHE))
    single, many = save_through_cache(rig, old_cuda)
    assert single > 400 and many == 0
    rig.end()


def test_a_batch_to_the_cache_that_fails_on_its_way_fails_its_job(make: Make, cuda: FakeCuda) -> None:
    rig = with_cache(make(**CACHE))
    cuda.hold_copies(True)
    bad = rig.save([3 * MANY, *SMALL], [LAZY] * 401, [0] * 401)
    wait_until(lambda: rig.engine.arena_used >= 2 * MANY, what="two chunks under way")
    cuda.fail("batched copies", skip=50, late=True)
    rig.engine.fence(rig.streams)
    assert bad.job.captured and rig.cached() > 0
    cuda.hold_copies(False)
    assert bad.job.wait_finished(DEADLINE_S)
    assert isinstance(bad.job.error, DeviceError) and "ILLEGAL_ADDRESS" in str(bad.job.error)
    assert rig.cached() == 0
    assert save_through_cache(rig, cuda) == (0, 2)
