"""The arena is pinned in slabs: what is refused is tried smaller, and what stays refused serves no device."""

from __future__ import annotations

from typing import Any

import pytest
from device_rig import EAGER, HOST, KIB, LAZY, MIB, Make, Rig, cuda, fake_library, make
from fake_driver import FakeCuda
from support import wait_until

from ckpt.errors import DeadlineError

__all__ = ["cuda", "fake_library", "make"]

SMALLEST = 256 * KIB  # four chunks
SLABS: dict[str, Any] = {
    "arena_bytes": 4 * MIB, "chunk_bytes": 64 * KIB, "pinned_slab_bytes": MIB, "smallest_pinned_slab_bytes": SMALLEST,
}  # fmt: skip


def opened(rig: Rig) -> Rig:
    rig.engine.open_devices([0, 1])
    wait_until(lambda: rig.engine.arena_pinned or rig.engine.pin_failure, what="the end of pinning")
    return rig


def save_and_check(rig: Rig, size: int = 700_000) -> None:
    """More than the arena, from both devices and the host; kernels overwrite it as soon as they may."""
    for kind in (LAZY, EAGER):
        saved = rig.save([size, 5, size, size] * 2, [kind] * 8, [0, 1, 1, HOST] * 2)
        if kind == LAZY:
            rig.engine.fence(rig.streams)
        rig.overwrite(saved, kind)
        rig.check(saved)


def test_a_large_arena_is_pinned_in_slabs(make: Make, cuda: FakeCuda) -> None:
    """A copy that reached from one into the next would be refused."""
    rig = opened(make(**SLABS))
    assert cuda.count("cuMemHostRegister") == 5, "a small one first, so that the first save need not wait long"
    assert rig.engine.arena_pinned and rig.engine.pin_failure == ""
    save_and_check(rig)
    assert rig.engine.arena_peak > 2 * MIB
    assert cuda.count("pageable copies") == 0


@pytest.mark.parametrize("seed", range(3))
def test_chunks_that_lie_across_slabs(make: Make, cuda: FakeCuda, seed: int) -> None:
    cuda.configure(seed=seed, most_delay_s=0.001)
    sizes: dict[str, Any] = {"pinned_slab_bytes": 300 * KIB, "smallest_pinned_slab_bytes": 140 * KIB}
    rig = opened(make(**(SLABS | sizes)))
    save_and_check(rig)
    assert cuda.count("pageable copies") == 0


def test_a_slab_that_is_refused_is_tried_at_half_its_size(make: Make, cuda: FakeCuda) -> None:
    cuda.limit_pinning(at_once=MIB // 2)
    rig = opened(make(**SLABS))
    assert rig.engine.arena_pinned and rig.engine.pin_failure == ""
    save_and_check(rig)
    assert cuda.count("pageable copies") == 0


def test_one_refusal_among_many_is_got_over(make: Make, cuda: FakeCuda) -> None:
    cuda.fail("cuMemHostRegister", skip=2, code=2)
    assert opened(make(**SLABS)).engine.arena_pinned


@pytest.mark.parametrize("altogether", [SMALLEST, MIB, 3 * MIB])
def test_what_cannot_be_pinned_serves_the_host_alone(make: Make, cuda: FakeCuda, altogether: int) -> None:
    cuda.configure(seed=1, most_delay_s=0.0005)
    cuda.limit_pinning(altogether=altogether)
    rig = opened(make(**SLABS))
    assert not rig.engine.arena_pinned and "cuMemHostRegister" in rig.engine.pin_failure
    save_and_check(rig)
    save_and_check(rig, 3000)
    saved = rig.save([100_000], [LAZY], [0])
    rig.check(saved)
    assert saved.job.stats["arena_pinned"], "what it has used of it"
    assert cuda.count("pageable copies") == 0


def test_a_save_does_not_wait_until_all_is_pinned(make: Make, cuda: FakeCuda) -> None:
    cuda.delay("cuMemHostRegister", 0.25)  # half a minute for all of it
    rig = make(**(SLABS | {"arena_bytes": 512 * MIB, "pinned_slab_bytes": 4 * MIB}))
    saved = rig.save([100_000, 100_000], [LAZY, EAGER], [0, 0])
    assert cuda.count("cuMemHostRegister") < 128
    cuda.delay("cuMemHostRegister", 0.0)
    rig.check(saved)
    assert cuda.count("pageable copies") == 0


@pytest.mark.parametrize("altogether", [0, SMALLEST - 4096])
def test_with_nothing_pinned_all_is_copied_inside_save(make: Make, cuda: FakeCuda, altogether: int) -> None:
    """A copy to pageable memory in the background would hold up the launches of all threads."""
    cuda.configure(most_delay_s=0.0005)
    cuda.limit_pinning(altogether=altogether)
    rig = make(**SLABS)
    saved = rig.save([300_000, 5, 70_000], [LAZY, EAGER, LAZY], [0, 1, HOST])
    copies = cuda.count("pageable copies")
    assert copies > 0 and cuda.count("copies that ended") == copies
    device_bytes = [(tensor, device) for tensor, device in zip(saved.tensors, saved.devices, strict=True) if device != HOST]
    for tensor, device in device_bytes:  # without a fence
        cuda.fill(device, rig.streams[device], tensor.data_ptr(), 0xEE, len(tensor))
    rig.engine.fence(rig.streams)
    rig.check(saved)
    assert cuda.count("pageable copies") == copies
    assert "cuMemHostRegister" in rig.engine.pin_failure and "CUDA_ERROR_OUT_OF_MEMORY" in rig.engine.pin_failure
    assert not saved.job.stats["arena_pinned"] and not rig.engine.arena_pinned
    save_and_check(rig)


def test_a_save_gives_up_on_memory_that_is_not_pinned_in_time(make: Make, cuda: FakeCuda) -> None:
    cuda.delay("cuMemHostRegister", 0.5)
    rig = make(**SLABS)
    with pytest.raises(DeadlineError, match=r"save-1.*not pinned in time"):
        rig.save([300_000], [LAZY], [0], timeout_s=0.05)
    assert not (rig.directory / "save-1").exists() and rig.engine.in_flight == 0
    rig.check(rig.save([300_000], [LAZY], [0]))
