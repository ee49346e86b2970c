"""Bytes of devices on their way to files, with the fake CUDA driver: tensors in host memory play those of GPUs."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import pytest
import torch
from device_rig import EAGER, HOST, KIB, LAZY, MIB, Make, Rig, Saved, cuda, fake_library, make
from fake_driver import DEFAULT_STREAM, FakeCuda, both_drivers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import DEADLINE_S, clear_faults, wait_until

from ckpt import _native

__all__ = ["cuda", "fake_library", "make"]
pytestmark = both_drivers


# ---- any state, any order, any delay ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    kinds: tuple[int, ...]  # cycled over the tensors
    devices: tuple[int, ...]  # cycled, too
    arena_bytes: int
    chunk_bytes: int
    writers: int
    cache_bytes: int
    window_bytes: int
    saves: int  # in flight at a fence
    rounds: int
    delay_s: float  # the longest, of each copy and of each kernel
    write_delay_s: float
    uniform: int
    direct: bool
    verify: bool
    default_stream: bool
    packed: bool = False


SIZES = st.one_of(st.sampled_from([0, 1, 64, 4095, 4096, 4097, 65536]), st.integers(0, 9000), st.integers(0, MIB))
CASES = st.builds(
    Case,
    sizes=st.lists(SIZES, min_size=1, max_size=9).map(tuple),
    kinds=st.lists(st.sampled_from([LAZY, LAZY, EAGER]), min_size=1, max_size=5).map(tuple),
    devices=st.lists(st.sampled_from([0, 0, 1, HOST]), min_size=1, max_size=5).map(tuple),
    arena_bytes=st.sampled_from([256 * KIB, 260 * KIB, MIB, 8 * MIB]),
    chunk_bytes=st.sampled_from([1 << power for power in range(16, 21)]),
    writers=st.integers(1, 3),
    cache_bytes=st.sampled_from([0, 256 * KIB, 300 * KIB, MIB, 32 * MIB]),
    window_bytes=st.sampled_from([0, 0, 512 * KIB, 32 * MIB]),
    saves=st.integers(1, 3),
    rounds=st.integers(1, 2),
    delay_s=st.sampled_from([0.0, 0.0005, 0.002]),
    write_delay_s=st.sampled_from([0.0, 0.0, 0.001]),
    uniform=st.sampled_from([0, 64, 4096]),
    direct=st.booleans(),
    verify=st.booleans(),
    default_stream=st.booleans(),
    packed=st.booleans(),
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, seed=st.integers(0, 1 << 32))
@example(Case((MIB,) * 3, (LAZY,), (0, 1), 256 * KIB, 65536, 1, 0, 0, 2, 2, 0.001, 0.001, 64, True, False, False), 1)
@example(
    Case((90_000,) * 9, (LAZY, LAZY, EAGER), (1, 0, HOST, 0), 256 * KIB, 65536, 1, 0, 0, 3, 2, 0.001, 0.0, 0, True, True, True),
    2,
)
@example(Case((300_000, 5) * 4, (EAGER,), (0, 0, 1), 256 * KIB, 65536, 2, 0, 0, 2, 1, 0.002, 0.001, 0, False, False, False), 3)
@example(Case((MIB,) * 3, (LAZY,), (0, 1), 256 * KIB, 65536, 1, 8 * MIB, 0, 2, 2, 0.001, 0.001, 64, True, False, False), 4)
@example(Case((90_000,) * 40, (LAZY,), (1, 0, HOST), 260 * KIB, 65536, 1, MIB, 0, 3, 2, 0.001, 0.001, 0, True, True, True), 5)
@example(
    Case(
        (90_001, 65536) * 9,
        (LAZY, EAGER),
        (1, HOST, 0),
        260 * KIB,
        65536,
        2,
        MIB,
        0,
        2,
        2,
        0.001,
        0.001,
        0,
        True,
        False,
        False,
        True,
    ),
    6,
)
@pytest.mark.usefixtures("native")
def test_the_file_holds_the_bytes_of_the_call(cuda: FakeCuda, tmp_path: Path, case: Case, seed: int) -> None:
    assert_file_holds_the_bytes(cuda, tmp_path, case, seed)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, seed=st.integers(0, 1 << 32))
@pytest.mark.usefixtures("native")
def test_the_file_holds_the_bytes_of_the_call_in_many_cases(cuda: FakeCuda, tmp_path: Path, case: Case, seed: int) -> None:
    assert_file_holds_the_bytes(cuda, tmp_path, case, seed)


def assert_file_holds_the_bytes(cuda: FakeCuda, tmp_path: Path, case: Case, seed: int) -> None:
    cuda.configure(seed=seed, most_delay_s=case.delay_s)
    torch.manual_seed(seed)
    streams = {0: DEFAULT_STREAM, 1: DEFAULT_STREAM} if case.default_stream else None
    rig = Rig(
        cuda, tmp_path, streams=streams, arena_bytes=case.arena_bytes, chunk_bytes=case.chunk_bytes, writers=case.writers,
        device_cache_bytes=case.cache_bytes, device_window_bytes=case.window_bytes,
    )  # fmt: skip
    if case.cache_bytes:
        rig.warm_up()
    count = len(case.sizes)
    kinds = [case.kinds[i % len(case.kinds)] for i in range(count)]
    devices = [case.devices[i % len(case.devices)] for i in range(count)]
    if case.write_delay_s:
        _native.set_fault("pwritev", delay_s=case.write_delay_s)
    try:
        for _ in range(case.rounds):
            saves = []
            for _ in range(case.saves):
                saved = rig.save(
                    list(case.sizes), kinds, devices, uniform=case.uniform, direct=case.direct, verify=case.verify,
                    packed=case.packed,
                )  # fmt: skip
                rig.overwrite(saved, EAGER)
                saves.append(saved)
            rig.engine.fence(rig.streams)
            assert all(saved.job.captured for saved in saves)
            for saved in saves:
                rig.overwrite(saved, LAZY)
            for saved in saves:
                rig.check(saved)
                saved.path.unlink()
    finally:
        clear_faults()
        rig.end()


# ---- what the fence promises -----------------------------------------------------------------------------------------


def test_files_are_those_of_host_tensors(make: Make) -> None:
    rig = make()
    sizes = [1, 100_000, 70_001, 0, 64, 300_000]
    kinds, devices = [LAZY, EAGER] * 3, [0, 1, HOST, 0, 1, 0]
    saved = rig.save(sizes, kinds, devices)
    host = rig.save(sizes, [EAGER] * 6, [HOST] * 6, tensors=saved.tensors)
    rig.check(saved)
    rig.check(host)
    assert saved.path.read_bytes() == host.path.read_bytes()
    on_devices = sum(size for size, device in zip(sizes, devices, strict=True) if device != HOST)
    assert saved.job.stats["bytes_from_devices"] == on_devices
    assert host.job.stats["bytes_from_devices"] == 0
    assert saved.job.stats["arena_pinned"] and rig.engine.arena_pinned and rig.engine.pin_failure == ""


def test_the_fence_does_not_wait_for_copies(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    saved = rig.save([500_000, 300_000, 10], [LAZY, LAZY, EAGER], [0, 1, 0])
    cuda.hold_copies(True)
    held = rig.save([500_000, 300_000, 10], [LAZY, LAZY, EAGER], [0, 1, 0])
    rig.overwrite(held, EAGER)
    rig.engine.fence(rig.streams)
    assert held.job.captured and not held.job.released and not held.job.finished
    assert not held.job.wait_released(0.05)
    rig.overwrite(held, LAZY)
    rig.overwrite(saved, LAZY)
    cuda.hold_copies(False)
    assert held.job.wait_released(DEADLINE_S)
    rig.check(saved)
    rig.check(held)
    assert held.job.stats["captured_at"] < held.job.stats["flushed_at"]


def test_a_fence_that_is_given_no_stream_waits_for_the_copies(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(most_delay_s=0.01)
    rig = make()
    saved = rig.save([500_000, 300_000], [LAZY, LAZY], [0, 1])
    rig.engine.fence({0: rig.streams[0]})
    rig.overwrite(saved, LAZY)
    rig.engine.fence()
    assert saved.job.released
    rig.check(saved)


def test_lazy_copies_wait_for_what_was_computed_before_the_save(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(most_delay_s=0.02)
    rig = make()
    tensor = torch.zeros(200_000, dtype=torch.uint8)
    cuda.fill(0, rig.streams[0], tensor.data_ptr(), 7, len(tensor))
    saved = rig.save([], [LAZY], [0], tensors=[tensor])
    saved.contents = [b"\x07" * len(tensor)]
    rig.check(saved)


def test_a_state_larger_than_the_arena_passes_the_fence(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(most_delay_s=0.0005)
    rig = make(arena_bytes=256 * KIB)
    saved = rig.save([3 * MIB, 2 * MIB], [LAZY, LAZY], [0, 1])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)
    assert rig.engine.arena_peak <= rig.engine.arena_bytes


def test_eager_bytes_of_a_large_state_do_not_wait_for_its_lazy_ones(make: Make, cuda: FakeCuda) -> None:
    rig = make(arena_bytes=512 * KIB)
    rig.engine.open_devices([0])
    wait_until(lambda: rig.engine.arena_pinned)
    cuda.hold_copies(True)
    saved = rig.save([100_000, 10] * 20, [LAZY, EAGER] * 20, [0] * 40, timeout_s=5)  # 2 MB
    rig.overwrite(saved, EAGER)
    assert not saved.job.captured
    cuda.hold_copies(False)
    rig.check(saved)


def test_threads_that_save_at_once_share_a_small_arena(make: Make, cuda: FakeCuda) -> None:
    cuda.configure(most_delay_s=0.0003)
    rig = make(arena_bytes=256 * KIB, writers=1)
    done: list[Saved] = []

    def train(order: int) -> None:
        devices = [order % 2, HOST, 1 - order % 2, 0, 1] * 3
        for turn in range(3):
            path = rig.directory / f"thread-{order}-{turn}"
            done.append(
                rig.save([40_000, 50_000, 1, 70_000, 60_000] * 3, [LAZY, EAGER, LAZY, EAGER, LAZY] * 3, devices, path=path)
            )

    threads = [threading.Thread(target=train, args=(order,)) for order in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        rig.engine.fence(rig.streams)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(done) == 9
    for saved in done:
        rig.check(saved)


def test_a_file_that_several_write_together(make: Make) -> None:
    rig = make()
    sizes, kinds, devices = [300_000, 17, 200_001, 90_000], [LAZY, EAGER, LAZY, EAGER], [0, 1, 1, 0]
    whole = rig.save(sizes, [EAGER] * 4, [HOST] * 4)
    shares = [
        rig.save(sizes, kinds, devices, share=(index, 3), path=rig.directory / "shared", tensors=whole.tensors)
        for index in range(3)
    ]
    rig.engine.fence(rig.streams)
    crcs = [0] * shares[0].job.record_count
    for share in shares:
        assert share.job.wait_finished(DEADLINE_S) and share.job.error is None
        for record, crc in zip(*share.job.checksums, strict=True):
            crcs[record] = crc
    offset, directory = shares[0].job.directory(crcs)
    _native.write_end(os.fsencode(shares[0].path), offset, directory)
    rig.check(whole)
    assert shares[0].path.read_bytes() == whole.path.read_bytes()


def test_streams_have_the_lowest_priority_and_copies_are_pinned(make: Make, cuda: FakeCuda) -> None:
    rig = make()
    rig.check(rig.save([100_000, 10, 10], [LAZY, EAGER, LAZY], [0, 0, 1]))
    assert cuda.count("streams of the lowest priority") == 2
    assert cuda.count("pinned copies") > 0 and cuda.count("pageable copies") == 0
    assert cuda.count("cuMemHostRegister") == 1
