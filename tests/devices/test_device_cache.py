"""Spare memory of devices, in which a fence keeps what has not left yet: what is not in it waits, what is does not."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from device_rig import HOST, KIB, LAZY, MIB, Make, Rig, Saved, cuda, fake_library, make
from fake_driver import FakeCuda
from support import DEADLINE_S, clear_faults, wait_until

from ckpt import _native
from ckpt.errors import DeviceError

__all__ = ["cuda", "fake_library", "make"]

GIB = 1 << 30
CHUNK = 64 * KIB
PAUSE_S = 0.05


def cached(saved: Saved) -> int:
    return int(saved.job.stats["device_cached_bytes"])


def is_overwritten(saved: Saved) -> bool:
    return all(int(tensor.min()) == int(tensor.max()) == 0xEE for tensor in saved.tensors)


def with_cache(make: Make, **options: Any) -> Rig:
    """An arena of eight chunks, and one chunk after the other on its way to it."""
    rig = make(**({"arena_bytes": 8 * CHUNK, "device_cache_bytes": 4 * MIB, "device_window_bytes": 0} | options))
    rig.warm_up()
    return rig


# ---- what the fence promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [4 * CHUNK, MIB - 5000, MIB, 2 * MIB, 8 * MIB])
@pytest.mark.parametrize("seed", range(3))
def test_what_computes_after_the_fence_never_reaches_the_file(
    make: Make, cuda: FakeCuda, cache_bytes: int, seed: int
) -> None:  # fmt: skip
    """Caches smaller than the state, as large, larger; saves one behind the other use them again."""
    cuda.configure(seed=seed, most_delay_s=0.001)
    rig = with_cache(make, device_cache_bytes=cache_bytes)
    through_the_cache = 0
    for _ in range(6):
        saved = rig.save([700_000, 10, MIB - 700_010], [LAZY] * 3, [0, 0, 0])
        rig.engine.fence(rig.streams)
        assert saved.job.captured
        rig.overwrite(saved, LAZY)
        rig.check(saved)
        assert rig.cached() == 0
        through_the_cache += cached(saved)
    assert through_the_cache > 0
    assert rig.engine.arena_peak <= rig.engine.arena_bytes


def test_the_fence_needs_no_room_in_the_arena(make: Make, cuda: FakeCuda) -> None:
    """No copy ends before the fence returns: with what the arena has no room for, the cache is the only way."""
    rig = with_cache(make, device_window_bytes=32 * MIB)
    cuda.hold_copies(True)
    saved = rig.save([2 * MIB], [LAZY], [0])
    wait_until(lambda: rig.engine.arena_used == rig.engine.arena_bytes, what="a full arena")
    rig.engine.fence(rig.streams)
    assert saved.job.captured and not saved.job.released
    assert rig.cached() >= cached(saved) > MIB
    rig.overwrite(saved, LAZY)
    cuda.hold_copies(False)
    rig.check(saved)


def test_what_is_counted_is_bytes_of_tensors(make: Make, cuda: FakeCuda) -> None:
    """Not what lies between them, which here is more."""
    rig = with_cache(make)
    cuda.hold_copies(True)
    saved = rig.save([65] * 2000, [LAZY] * 2000, [0] * 2000)
    rig.engine.fence(rig.streams)
    assert rig.cached() > 65 * 2000 >= cached(saved) > 0
    cuda.hold_copies(False)
    rig.check(saved)
    assert cached(saved) <= saved.job.stats["bytes_from_devices"] == 65 * 2000


def test_neither_host_nor_stream_waits_for_what_is_in_the_cache(make: Make, cuda: FakeCuda) -> None:
    """The disk hangs, then the way to the host does; the training computes all the same."""
    rig = with_cache(make, writers=1, device_window_bytes=32 * MIB)
    try:
        _native.set_fault("pwritev", "save-3", count=1, delay_s=DEADLINE_S)
        saved = rig.save([2 * MIB], [LAZY], [0])
        wait_until(lambda: rig.engine.arena_used == rig.engine.arena_bytes, what="a full arena")
        wait_until(lambda: cuda.count("copies that ended") == cuda.count("cuMemcpyDtoHAsync"))
        cuda.hold_copies(True, only_from_allocated=True)
        rig.engine.fence(rig.streams)
        assert saved.job.captured and not saved.job.finished
        assert cached(saved) > MIB
        rig.overwrite(saved, LAZY)
        wait_until(lambda: is_overwritten(saved))
        assert saved.job.wait_released(DEADLINE_S), "its memory may go: the rest is read from the cache"
        assert not saved.job.finished
    finally:
        clear_faults()
    cuda.hold_copies(False)
    rig.check(saved)


def test_a_later_fence_does_not_wait_for_what_leaves_the_cache(make: Make, cuda: FakeCuda) -> None:
    rig = with_cache(make)
    cuda.hold_copies(True, only_from_allocated=True)
    saved = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    assert cached(saved) > 0
    wait_until(lambda: saved.job.released)
    copies = ("cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "batched copies")
    wait_until(lambda: sum(map(cuda.count, copies)) > cuda.count("copies that ended"), what="copies out of the cache")
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    wait_until(lambda: is_overwritten(saved))
    assert not saved.job.finished
    cuda.hold_copies(False)
    rig.check(saved)


def test_little_is_on_its_way_when_the_fence_comes(make: Make, cuda: FakeCuda) -> None:
    """With room for all of it in the arena, the lane still leaves it to the fence: the stream would wait for it."""
    rig = with_cache(make, arena_bytes=16 * MIB, device_cache_bytes=8 * MIB, device_window_bytes=MIB)
    cuda.hold_copies(True)
    saved = rig.save([6 * MIB], [LAZY], [0])
    wait_until(lambda: rig.engine.arena_used >= MIB)
    rig.engine.fence(rig.streams)
    assert saved.job.captured
    assert 5 * MIB <= cached(saved) < 6 * MIB
    rig.overwrite(saved, LAZY)
    assert rig.engine.arena_used <= MIB + 2 * CHUNK, "from the cache, too, only so much is on its way"
    cuda.hold_copies(False)
    rig.check(saved)


def test_without_a_cache_little_is_on_its_way_until_a_fence_comes(make: Make, cuda: FakeCuda) -> None:
    """Devices copy in the order in which they are asked: what training copies meanwhile would wait for all of it."""
    rig = make(arena_bytes=8 * MIB, device_window_bytes=MIB)
    cuda.hold_copies(True)
    saves = [rig.save([2 * MIB, 10], [LAZY] * 2, [0, 0]) for _ in range(2)]
    wait_until(lambda: rig.engine.arena_used >= MIB)
    time.sleep(PAUSE_S)
    assert rig.engine.arena_used <= MIB + 2 * CHUNK and not saves[0].job.captured
    rig.engine.fence(rig.streams)
    assert all(saved.job.captured and cached(saved) == 0 for saved in saves), "it has enqueued all"
    for saved in saves:
        rig.overwrite(saved, LAZY)
    cuda.hold_copies(False)
    for saved in saves:
        rig.check(saved)


def test_what_the_window_holds_back_follows_without_a_fence(make: Make, cuda: FakeCuda) -> None:
    rig = make(device_window_bytes=0)
    rig.check(rig.save([5 * MIB], [LAZY], [0]))


def test_several_saves_share_the_cache(make: Make, cuda: FakeCuda) -> None:
    rig = with_cache(make)
    cuda.hold_copies(True)
    saves = [rig.save([MIB, 10, 300_000], [LAZY] * 3, [0, 0, 1]) for _ in range(2)]
    rig.engine.fence(rig.streams)
    for saved in saves:
        assert saved.job.captured and cached(saved) > 0
        rig.overwrite(saved, LAZY)
    assert rig.cached(0) > 0 and rig.cached(1) > 0
    cuda.hold_copies(False)
    for saved in saves:
        rig.check(saved)


def test_what_does_not_fit_goes_the_old_way(make: Make, cuda: FakeCuda) -> None:
    """The newest save has the cache: the lane comes to it last."""
    cuda.configure(most_delay_s=0.001)
    rig = with_cache(make, device_cache_bytes=8 * CHUNK)
    cuda.hold_copies(True)
    saves = [rig.save([MIB], [LAZY], [0]) for _ in range(3)]
    fence = threading.Thread(target=rig.engine.fence, args=(rig.streams,))
    fence.start()
    wait_until(lambda: cached(saves[-1]) > 6 * CHUNK)
    assert cached(saves[0]) + cached(saves[1]) < 2 * CHUNK, "but for what is smaller than a chunk"
    assert not saves[0].job.captured, "the arena has no room"
    cuda.hold_copies(False)
    fence.join(DEADLINE_S)
    for saved in saves:
        assert saved.job.captured
        rig.overwrite(saved, LAZY)
    for saved in saves:
        rig.check(saved)


def test_chunks_of_several_devices(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(seed=1, most_delay_s=0.001)
    rig = with_cache(make)
    saved = rig.save([9000, 8000, 70_000] * 12, [LAZY] * 36, [0, 1, HOST, 1, 0] * 7 + [0])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)
    assert cached(saved) > 0


def test_a_device_that_is_not_named_goes_the_old_way(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(most_delay_s=0.002)
    rig = with_cache(make)
    saved = rig.save([MIB, MIB], [LAZY, LAZY], [0, 1])
    rig.engine.fence({0: rig.streams[0]})
    assert saved.job.captured
    assert 0 < cached(saved) <= MIB
    rig.overwrite(saved, LAZY)
    rig.check(saved)


def test_a_second_fence_on_another_stream(make: Make, cuda: FakeCuda) -> None:
    """Copies to the cache are on their way on the stream of the first: what the other one computes comes after them."""
    cuda.configure(most_delay_s=0.01)
    rig = with_cache(make)
    saved = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    assert cached(saved) > 0
    rig.streams[0] = cuda.stream(0)
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)


def test_a_fence_on_another_stream_than_the_save(make: Make, cuda: FakeCuda) -> None:
    """Copies to the cache come after what was computed before the save."""
    rig = with_cache(make)
    other = cuda.stream(0)
    tensor = torch.zeros(MIB, dtype=torch.uint8)
    cuda.configure(most_delay_s=0.02)
    for value in range(30, 6, -1):
        cuda.fill(0, rig.streams[0], tensor.data_ptr(), value, len(tensor))
    saved = rig.save([], [LAZY], [0], tensors=[tensor])
    saved.contents = [b"\x07" * len(tensor)]
    rig.engine.fence({0: other})
    assert cached(saved) > 0
    rig.check(saved)


# ---- memory ----------------------------------------------------------------------------------------------------------


def save_and_check(rig: Rig) -> Saved:
    saved = rig.save([MIB, 10], [LAZY, LAZY], [0, 1])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)
    return saved


@pytest.mark.parametrize(("failures", "size"), [(0, 4 * MIB), (1, 2 * MIB), (3, 512 * KIB), (4, 256 * KIB), (5, 0)])
def test_a_block_that_is_refused_is_asked_for_smaller(make: Make, cuda: FakeCuda, failures: int, size: int) -> None:
    rig = make(device_cache_bytes=4 * MIB)
    for _ in range(failures):
        cuda.fail("cuMemAlloc", code=2)
    for _ in range(2):
        rig.check(rig.save([10], [LAZY], [0]))
    wait_until(lambda: any(rig.engine.device_caches[0][::2]))
    held, _, failure = rig.engine.device_caches[0]
    assert held == size
    assert failure == "" if size else "cuMemAlloc on CUDA device 0 failed with CUDA_ERROR_OUT_OF_MEMORY" in failure
    save_and_check(rig)


@pytest.mark.parametrize(
    ("total", "others", "size"),
    [(GIB, 511 * MIB, MIB), (GIB, 512 * MIB, 0), (GIB, GIB, 0), (40 * GIB, 37 * GIB, 4 * MIB), (40 * GIB, 38 * GIB, 0)],
)
def test_a_reserve_is_left_to_the_training(make: Make, cuda: FakeCuda, total: int, others: int, size: int) -> None:
    cuda.set_memory(total=total, others=others)
    rig = with_cache(make)
    held, _, failure = rig.engine.device_caches[0]
    assert held == size
    assert failure == "" if size else "there is no memory for the cache on CUDA device 0" in failure
    saved = save_and_check(rig)
    assert bool(size) or cached(saved) == 0


def test_a_limit_too_small_to_be_of_use(make: Make) -> None:
    rig = with_cache(make, device_cache_bytes=3 * CHUNK)
    held, _, failure = rig.engine.device_caches[0]
    assert held == 0 and "device_cache is less than" in failure
    save_and_check(rig)


def test_a_driver_that_does_not_tell_how_much_is_free(make: Make, cuda: FakeCuda) -> None:
    cuda.fail("cuMemGetInfo")
    rig = make(device_cache_bytes=4 * MIB)
    for _ in range(2):
        rig.check(rig.save([10], [LAZY], [0]))
    wait_until(lambda: bool(rig.engine.device_caches[0][2]))
    assert rig.engine.device_caches[0][0] == 0 and "cuMemGetInfo" in rig.engine.device_caches[0][2]
    save_and_check(rig)


def test_the_block_is_given_back_when_memory_is_scarce(make: Make, cuda: FakeCuda) -> None:
    rig = with_cache(make)
    taken = cuda.alive()["allocations"]
    cuda.hold_copies(True)
    saved = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    cuda.set_memory(total=GIB, others=GIB)
    second = rig.save([10], [LAZY], [0])  # the cache is in use
    rig.engine.fence(rig.streams)
    assert rig.cached(0) > 0
    cuda.hold_copies(False)
    rig.check(saved)
    rig.check(second)
    rig.check(rig.save([10, 10], [LAZY, LAZY], [0, 1]))
    wait_until(lambda: cuda.alive()["allocations"] == taken - 2)
    for held, used, failure in rig.engine.device_caches.values():
        assert (held, used) == (0, 0) and "was given back" in failure
    cuda.set_memory(total=4 * GIB)
    assert cached(save_and_check(rig)) == 0, "it is not taken again"


def test_the_block_is_taken_when_an_iteration_has_gone_by(make: Make, cuda: FakeCuda) -> None:
    """At the second save: until then nobody knows what the training needs at its peak."""
    before = cuda.alive()["allocations"]
    rig = make(device_cache_bytes=4 * MIB)
    cuda.hold_copies(True)
    files = [rig.save([10], [LAZY], [0]) for _ in range(2)]  # of one save
    cuda.hold_copies(False)
    for saved in files:
        rig.check(saved)
    time.sleep(PAUSE_S)
    assert cuda.alive()["allocations"] == before and rig.engine.device_caches[0] == (0, 0, "")
    rig.check(rig.save([10], [LAZY], [0]))
    wait_until(lambda: rig.engine.device_caches[0][0] == 4 * MIB)


def test_the_block_is_given_back_between_saves(make: Make, cuda: FakeCuda) -> None:
    """In the middle of a forward: the next save would be too late."""
    rig = with_cache(make)
    taken = cuda.alive()["allocations"]
    cuda.set_memory(total=GIB, others=GIB - 100 * MIB)
    wait_until(lambda: cuda.alive()["allocations"] == taken - 2)
    for held, used, failure in rig.engine.device_caches.values():
        assert (held, used) == (0, 0) and "was given back" in failure
    cuda.set_memory(total=4 * GIB)
    assert cached(save_and_check(rig)) == 0, "it is not taken again"


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("skip", [0, 3])
def test_a_copy_to_the_cache_that_fails_fails_its_save_only(make: Make, cuda: FakeCuda, late: bool, skip: int) -> None:
    rig = with_cache(make)
    cuda.hold_copies(True)
    before = rig.save([10_000], [LAZY], [0])
    cuda.fail("cuMemcpyDtoDAsync", skip=skip, late=late)
    bad = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    assert bad.job.captured
    rig.overwrite(before, LAZY)
    rig.overwrite(bad, LAZY)
    if late or skip:  # copies to it are on their way
        assert rig.cached() > 0
    cuda.hold_copies(False)
    assert bad.job.wait_finished(DEADLINE_S)
    assert isinstance(bad.job.error, DeviceError) and not bad.path.exists()
    assert "CUDA device 0" in str(bad.job.error) and str(bad.path) in str(bad.job.error)
    assert late or "cuMemcpyDtoDAsync" in str(bad.job.error)
    rig.check(before)
    assert rig.cached() == 0
    cuda.hold_copies(True)
    after = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    rig.overwrite(after, LAZY)
    assert cached(after) > 0
    cuda.hold_copies(False)
    rig.check(after)


CALLS = ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuCtxGetCurrent"]


@pytest.mark.parametrize("call", CALLS)
def test_any_call_may_fail(make: Make, cuda: FakeCuda, call: str) -> None:
    """Whoever learns of it: no other bytes than those of the save are in any file, and the next is as good as ever."""
    cuda.configure(most_delay_s=0.001)
    rig = with_cache(make)
    struck = 0
    for skip in range(12):
        saved = rig.save([MIB, 150_000], [LAZY, LAZY], [0, 1])
        cuda.fail(call, skip=skip, code=2)
        try:
            rig.engine.fence(rig.streams)
        except DeviceError as error:
            assert "CUDA_ERROR_OUT_OF_MEMORY" in str(error)
            struck += 1
        else:
            rig.overwrite(saved, LAZY)
        assert saved.job.wait_finished(DEADLINE_S)
        struck += saved.job.error is not None
        if saved.job.error is None:
            rig.check(saved)
        else:
            cuda.violations()  # its copies may still read what is written now: no file will hold that
        cuda.configure(most_delay_s=0.001)
        save_and_check(rig)
    assert struck


def test_a_save_that_fails_keeps_its_part_of_the_cache_while_copies_are_on_their_way(make: Make, cuda: FakeCuda) -> None:
    rig = with_cache(make)
    cuda.hold_copies(True)
    saved = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    saved.job.fail("for a reason of its own")
    used = rig.cached()
    assert used > MIB // 2
    other = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    assert rig.cached() >= used + cached(other) > used
    for each in (saved, other):
        rig.overwrite(each, LAZY)
    cuda.hold_copies(False)
    rig.check(other)
    assert saved.job.wait_finished(DEADLINE_S)
    assert rig.cached() == 0 and not saved.path.exists()


def test_an_engine_ends_with_its_cache_in_use(cuda: FakeCuda, make: Make) -> None:
    """Given up on while copies hang: the block goes when they have ended, and not before."""
    rig = with_cache(make)
    cuda.hold_copies(True)
    saved = rig.save([MIB], [LAZY], [0])
    rig.engine.fence(rig.streams)
    assert not rig.engine.close(0.05)
    cuda.hold_copies(False)
    assert saved.job.wait_finished(DEADLINE_S) and saved.job.error is not None
    wait_until(lambda: rig.engine.in_flight == 0)
