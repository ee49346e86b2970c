"""How much of the driver a save asks for: each call locks the context of the training's threads."""

from __future__ import annotations

import time

import pytest
from device_rig import EAGER, KIB, LAZY, MIB, Make, Rig, cuda, fake_library, make
from fake_driver import FakeCuda
from support import wait_until

__all__ = ["cuda", "fake_library", "make"]

PAUSE_S = 0.05


def warm(rig: Rig) -> Rig:
    rig.engine.open_devices([0, 1])
    wait_until(lambda: rig.engine.arena_pinned)
    return rig


def save_all(rig: Rig, kind: int = LAZY) -> None:
    saved = rig.save([48 * MIB], [kind], [0])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)


@pytest.mark.parametrize("kind", [LAZY, EAGER])
def test_events_are_used_again(make: Make, cuda: FakeCuda, kind: int) -> None:
    cuda.configure(most_delay_s=0.0005)
    rig = warm(make(arena_bytes=16 * MIB, chunk_bytes=MIB))
    for _ in range(6):
        save_all(rig, kind)
    assert cuda.count("cuEventCreate") <= 24, "for as many flights as may be under way in the arena, not for 300 chunks"
    assert cuda.count("cuEventDestroy") == 0


def test_an_event_stands_for_many_chunks(make: Make, cuda: FakeCuda) -> None:
    """With 16 MiB between them, where there is room for so many."""
    rig = warm(make(arena_bytes=64 * MIB, chunk_bytes=MIB))
    before = cuda.count("cuEventRecord")
    save_all(rig)
    assert cuda.count("cuEventRecord") - before <= 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cache", [0, 2 * MIB])
def test_flights_of_several_chunks(make: Make, cuda: FakeCuda, cache: int, seed: int) -> None:
    """Of both devices, through an arena and a cache that hold a part."""
    cuda.configure(seed=seed, most_delay_s=0.001)
    rig = warm(make(arena_bytes=MIB, chunk_bytes=64 * KIB, device_cache_bytes=cache))
    for _ in range(3):
        saved = rig.save([700_000, 9, 300_000, 5000] * 3, [LAZY, LAZY, EAGER] * 4, [0, 1, 0, 1, 1] * 2 + [0, 1])
        rig.overwrite(saved, EAGER)
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, LAZY)
        rig.check(saved)


def test_few_copies_are_in_the_stream_until_a_fence_comes(make: Make, cuda: FakeCuda) -> None:
    """However small: a stream holds about a thousand calls, and whoever makes one more waits."""
    rig = warm(make(arena_bytes=8 * MIB))
    count = 4000
    cuda.hold_copies(True)
    saved = rig.save([300] * count, [LAZY] * count, [0] * count)
    wait_until(lambda: cuda.count("cuMemcpyDtoHAsync") > 400)
    time.sleep(PAUSE_S)
    assert cuda.count("cuMemcpyDtoHAsync") < 800
    rig.engine.fence(rig.streams)
    assert saved.job.captured and cuda.count("cuMemcpyDtoHAsync") >= count
    rig.overwrite(saved, LAZY)
    cuda.hold_copies(False)
    rig.check(saved)


def test_a_copy_that_fails_fails_all_of_its_save(make: Make, cuda: FakeCuda) -> None:
    rig = warm(make(arena_bytes=16 * MIB, chunk_bytes=MIB))
    for late in (False, True):
        cuda.fail("cuMemcpyDtoHAsync", skip=5, late=late)
        bad = rig.save([12 * MIB], [LAZY], [0])
        wait_until(lambda bad=bad: bad.job.finished)
        assert bad.job.error is not None and not bad.path.exists()
        save_all(rig)


@pytest.mark.parametrize("fenced", [False, True])
def test_a_rate_holds_back_what_no_fence_waits_for(make: Make, cuda: FakeCuda, fenced: bool) -> None:
    """Within an hour, 64 KiB a second would bring no more than a beginning: a fence does not wait for that."""
    rig = make(arena_bytes=64 * MIB, device_rate=64 * KIB)
    saved = rig.save([40 * MIB], [LAZY], [0])
    wait_until(lambda: cuda.count("copies that ended") > 0)
    if fenced:
        rig.engine.fence(rig.streams)
        rig.overwrite(saved, LAZY)
        rig.check(saved)
    else:
        time.sleep(0.1)
        assert cuda.count("copies that ended") * 64 * KIB <= 17 * MIB and not saved.job.captured
        rig.engine.fence(rig.streams)
        rig.check(saved)
