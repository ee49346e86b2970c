"""Probes and sums: bytes of devices that are not what they were at save() are found before anything is published."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from device_rig import EAGER, HOST, KIB, LAZY, MIB, Make, cuda, fake_library, make
from fake_driver import FakeCuda, both_drivers
from support import DEADLINE_S, wait_until

from ckpt.errors import CaptureError

__all__ = ["cuda", "fake_library", "make"]

SPOILT = 0xEE


@pytest.fixture
def slow_writes(native: Any) -> Iterator[None]:
    """The arena, which is smaller than the states below, stays full for a while: what leaves last is still on its device."""
    native.set_fault("write", delay_s=0.1)
    yield
    native.clear_faults()


@both_drivers
@pytest.mark.parametrize("kind", [LAZY, EAGER])
@pytest.mark.parametrize("seed", range(4))
def test_what_nobody_writes_to_is_as_it_was(make: Make, cuda: FakeCuda, seed: int, kind: int) -> None:
    cuda.configure(seed=seed, most_delay_s=0.0005)
    chance = random.Random(seed)
    rig = make()
    for _ in range(3):
        count = chance.choice([1, 3, 40])
        sizes = [chance.choice([1, 100, 64 * KIB, 300_001]) for _ in range(count)]
        devices = [chance.choice([0, 1, HOST]) for _ in range(count)]
        saved = rig.save(sizes, [kind] * count, devices, probe=True, packed=seed % 2 == 1)
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, kind)
        rig.check(saved)
        of_devices = sum(size for size, device in zip(sizes, saved.devices, strict=True) if device != HOST)
        assert min(of_devices, 1) <= saved.job.stats["probed_bytes"] <= of_devices
        assert saved.job.stats["changed_device"] == HOST


@both_drivers
def test_a_small_state_is_probed_as_a_whole(make: Make) -> None:
    rig = make()
    saved = rig.save([1000, 2000, 3000, 60], [LAZY] * 4, [0, 1, 0, 0], probe=True)
    rig.check(saved)
    assert saved.job.stats["probed_bytes"] == 6060


@pytest.mark.usefixtures("slow_writes")
@pytest.mark.parametrize("device", [0, 1])
def test_a_write_without_a_fence_fails_the_save(make: Make, cuda: FakeCuda, device: int) -> None:
    rig = make(arena_bytes=256 * KIB)
    devices = [1 - device] * 3 + [device]
    saved = rig.save([MIB // 2] * 3 + [2 * MIB], [LAZY] * 4, devices, probe=True, packed=device == 1)
    late = saved.tensors[3]
    cuda.excused.append("race")
    cuda.fill(device, rig.streams[device], late.data_ptr(), SPOILT, len(late))
    assert saved.job.wait_finished(DEADLINE_S)
    error = saved.job.error
    assert isinstance(error, CaptureError) and error.record == 1 + 3  # behind the head
    assert saved.job.stats["changed_device"] == device
    assert not saved.path.exists()


@pytest.mark.usefixtures("slow_writes")
def test_without_probes_nothing_tells_of_it(make: Make, cuda: FakeCuda) -> None:
    """Which shows that the test above can fail."""
    rig = make(arena_bytes=256 * KIB)
    saved = rig.save([2 * MIB], [LAZY], [0])
    cuda.excused.append("race")
    cuda.fill(0, rig.streams[0], saved.tensors[0].data_ptr(), SPOILT, 2 * MIB)
    assert saved.job.wait_finished(DEADLINE_S) and saved.job.error is None
    with pytest.raises(AssertionError):
        rig.check(saved)


def test_probes_that_never_arrive(make: Make, cuda: FakeCuda) -> None:
    """The save fails at its deadline, and the memory stays until the copies have ended."""
    rig = make()
    cuda.hold_copies(True)
    saved = rig.save([300_000], [LAZY], [0], probe=True, timeout_s=0.2)
    wait_until(lambda: saved.job.error is not None)
    assert "did not end within" in str(saved.job.error) and not saved.job.finished
    cuda.hold_copies(False)
    assert saved.job.wait_finished(DEADLINE_S)


def test_a_probe_that_is_refused(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.check(rig.save([10], [LAZY], [0]))
    cuda.fail("cuMemcpyDtoHAsync", code=2)
    with pytest.raises(Exception, match="CUDA_ERROR_OUT_OF_MEMORY"):
        rig.save([300_000], [EAGER], [0], probe=True)
    wait_until(lambda: rig.engine.in_flight == 0)
    rig.check(rig.save([300_000], [EAGER], [0], probe=True))


def test_without_pinned_memory_there_are_none(make: Make, cuda: FakeCuda) -> None:
    cuda.limit_pinning(altogether=0)
    rig = make()
    saved = rig.save([300_000], [LAZY], [0], probe=True)
    rig.check(saved)
    assert saved.job.stats["probed_bytes"] == 0


def sum_of(content: bytes) -> int:
    words = [content[at : at + 8].ljust(8, b"\0") for at in range(0, len(content), 8)]
    return sum(int.from_bytes(word, "little") for word in words) % (1 << 64)


@both_drivers
@pytest.mark.parametrize("uniform", [0, 64])
@pytest.mark.parametrize("seed", range(3))
def test_sums_of_what_was_written(make: Make, seed: int, uniform: int) -> None:
    """Of records that begin anywhere, and reach over several chunks."""
    chance = random.Random(seed)
    rig = make()
    sizes = [chance.choice([1, 7, 8, 4097, 64 * KIB, 200_003, 300_001]) for _ in range(12)]
    kinds = [chance.choice([LAZY, EAGER]) for _ in sizes]
    devices = [chance.choice([0, 1, HOST]) for _ in sizes]
    saved = rig.save(sizes, kinds, devices, uniform=uniform, sum=True)
    rig.check(saved)
    found = saved.job.word_sums[1 : 1 + len(sizes)]
    contents = [b"" if device == HOST else content for content, device in zip(saved.contents, devices, strict=True)]
    assert found == [(sum_of(content), len(content)) for content in contents]


def test_an_arena_that_grows(make: Make, native: Any) -> None:
    """What is new is pinned, and saves that did not fit before need not wait for the disk."""
    rig = make(arena_bytes=MIB, most_arena_bytes=8 * MIB, pinned_slab_bytes=MIB)
    assert (rig.engine.arena_bytes, rig.engine.most_arena_bytes) == (MIB, 8 * MIB)
    rig.check(rig.save([100_000], [LAZY], [0]))
    rig.engine.grow_arena(6 * MIB)
    rig.engine.grow_arena(2 * MIB)
    assert rig.engine.arena_bytes == 6 * MIB
    wait_until(lambda: rig.engine.arena_pinned)
    native.set_fault("write", delay_s=0.05)
    saved = rig.save([4 * MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    native.clear_faults()
    rig.check(saved)
    assert rig.engine.arena_peak > MIB
    rig.engine.grow_arena(100 * MIB)
    assert rig.engine.arena_bytes == 8 * MIB


def test_an_arena_grows_while_saves_are_under_way(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(seed=3, most_delay_s=0.0005)
    rig = make(arena_bytes=256 * KIB, most_arena_bytes=16 * MIB)
    for size in range(1, 17):
        rig.engine.grow_arena(size * MIB)
        saved = rig.save([MIB, 300_000, 5], [LAZY, EAGER, LAZY], [0, 1, HOST], probe=True)
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, LAZY)
        rig.check(saved)
