"""The strict model of the CUDA driver reports each breach of its rules, in every run, and nothing else."""

from __future__ import annotations

import ctypes
import shutil
import threading
from pathlib import Path

import pytest
from fake_driver import DEFAULT_STREAM, ILLEGAL_ADDRESS, NOT_READY, loaded
from strict_face import NON_BLOCKING, PAGE, SIZE, Face, bytes_at, cuda, face, fake_library, in_thread

__all__ = ["cuda", "face", "fake_library"]
pytestmark = pytest.mark.parametrize("fake_library", ["strict"], indirect=True)


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [True, False], ids=["copy_has_ended", "copy_is_held"])
def test_a_write_after_a_read_on_another_stream(face: Face, ended: bool) -> None:
    """However early the copy ends."""
    memory, target, side, compute = face.allocation(), face.pinned(), face.stream(), face.stream()
    face.fake.hold_copies(not ended)
    assert face.to_host(target, memory, side) == 0
    if ended:
        while face.fake.count("copies that ended") == 0:
            pass
    face.kernel(memory, compute)
    face.found("race", "write of", "a kernel", "behind the read of", "cuMemcpyDtoHAsync", f"+{SIZE}")


@pytest.mark.parametrize("edge", ["event", "same stream", "stream wait", "event wait", "query", "context wait", "told"])
def test_a_write_that_is_ordered_behind_the_read(face: Face, edge: str) -> None:
    memory, target, side, compute = face.allocation(), face.pinned(), face.stream(), face.stream()
    face.kernel(memory, side, 7)
    assert face.to_host(target, memory, side) == 0
    event = face.recorded(side)
    if edge == "event":
        face.do("cuStreamWaitEvent", compute, event, 0)
    elif edge == "same stream":
        compute = side
    elif edge == "stream wait":
        face.wait(side)
    elif edge == "event wait":
        face.do("cuEventSynchronize", event)
    elif edge == "query":
        while (code := face.code("cuEventQuery", event)) == NOT_READY:
            pass
        assert code == 0
    elif edge == "context wait":
        face.do("cuCtxSynchronize")
    else:
        in_thread(lambda: (face.fake.make_current(0), face.wait(side)))
        face.fake.learn()
    face.kernel(memory, compute)
    face.do("cuCtxSynchronize")
    assert bytes_at(target) == {7} and bytes_at(memory) == {1}
    face.found()


def test_an_event_orders_only_what_was_enqueued_before_it(face: Face) -> None:
    memory, target, side, compute = face.allocation(), face.pinned(), face.stream(), face.stream()
    event = face.recorded(side)
    assert face.to_host(target, memory, side) == 0
    face.do("cuStreamWaitEvent", compute, event, 0)
    face.kernel(memory, compute)
    face.found("race")


def test_another_threads_wait_is_no_wait_for_a_kernel_but_one_for_a_copy(face: Face) -> None:
    memory, other, side, compute = face.allocation(), face.allocation(), face.stream(), face.stream()
    assert face.on_device(other, memory, side) == 0
    in_thread(lambda: (face.fake.make_current(0), face.wait(side)))
    assert face.on_device(memory, other, compute) == 0
    face.found()
    face.kernel(other, face.stream())
    assert len(face.fake.violations()) == 2, "behind the write, and behind the read"


def test_reads_do_not_race(face: Face) -> None:
    memory = face.allocation()
    for _ in range(2):
        assert face.to_host(face.pinned(), memory, face.stream()) == 0
    face.found()


@pytest.mark.parametrize(("offset", "races"), [(0, True), (50, True), (99, True), (100, False)])
def test_only_the_same_bytes_race(face: Face, offset: int, races: bool) -> None:
    memory, target = face.allocation(), face.pinned()
    assert face.to_host(target, memory, face.stream(), 100) == 0
    face.kernel(memory + offset, face.stream(), size=10)
    assert bool(face.fake.violations()) == races


def test_two_copies_into_the_same_pinned_memory_race(face: Face) -> None:
    target, side = face.pinned(), face.stream()
    assert face.to_host(target, face.allocation(), side) == 0
    assert face.to_host(target, face.allocation(), side) == 0
    face.found()
    assert face.to_host(target, face.allocation(), face.stream()) == 0
    face.found("race", "write of")


@pytest.mark.parametrize(("flags", "races"), [(0, False), (NON_BLOCKING, True)], ids=["blocking", "non_blocking"])
@pytest.mark.parametrize("first", ["default", "other"])
def test_the_default_stream_is_in_order_with_blocking_streams(face: Face, flags: int, races: bool, first: str) -> None:
    memory, target, other, default = face.allocation(), face.pinned(), face.stream(flags), ctypes.c_void_p(DEFAULT_STREAM)
    before, after = (default, other) if first == "default" else (other, default)
    assert face.to_host(target, memory, before) == 0
    face.kernel(memory, after)
    assert bool(face.fake.violations()) == races


def test_threads_have_default_streams_of_their_own(face: Face) -> None:
    memory, target, per_thread = face.allocation(), face.pinned(), ctypes.c_void_p(2)
    assert face.to_host(target, memory, per_thread) == 0
    assert face.on_device(memory, face.allocation(), per_thread) == 0
    face.found()
    in_thread(lambda: (face.fake.make_current(0), face.on_device(memory, face.allocation(), per_thread)))
    face.found("race")


def test_the_copies_of_a_batch_have_no_order(face: Face) -> None:
    first, second, third, side = face.allocation(), face.allocation(), face.allocation(), face.stream()
    assert face.batch([(second, first), (third, first)], side)[0] == 0
    face.found()
    assert face.batch([(second, first), (third, second)], side)[0] == 0
    face.found("race", "cuMemcpyBatchAsync")
    assert face.on_device(first, third, side) == 0
    face.found()


def test_a_copy_onto_itself(face: Face) -> None:
    memory, side = face.allocation(), face.stream()
    assert face.on_device(memory + 100, memory, side, 100) == 0
    face.found()
    assert face.on_device(memory + 50, memory, side, 100) == 0
    face.found("race")


def test_what_a_test_does_itself_is_seen_if_it_tells(face: Face) -> None:
    target, side = face.pinned(), face.stream()
    assert face.to_host(target, face.allocation(), side) == 0
    face.cu.fake_touch(ctypes.c_void_p(target), ctypes.c_size_t(1), 0)
    face.found("race", "host's read")
    face.wait(side)
    face.cu.fake_touch(ctypes.c_void_p(target), ctypes.c_size_t(1), 0)
    face.found()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_copy_stays_within_an_allocation(face: Face) -> None:
    memory, target, side = face.allocation(100), face.pinned(), face.stream()
    assert face.to_host(target, memory + 1, side, 99) == 0
    assert face.to_host(target, memory + 1, side, 100) == 1
    face.found("cuMemcpyDtoHAsync is given", "crosses the end")
    assert face.to_host(target, face.host(), side) == 1
    (told,) = face.fake.violations()
    # What begins in memory that a test before has told of, and has freed since, is not within it either.
    assert "no memory of a device" in told or "crosses the end" in told, told
    assert face.batch([(face.allocation(), face.allocation()), (face.allocation(10), face.allocation())], side) == (1, 1)
    face.found("crosses the end")


def test_a_copy_does_not_join_neighbours(face: Face) -> None:
    memory, target, side = face.host(), face.pinned(), face.stream()
    for begin, size in ((memory, 100), (memory + 100, 100)):
        face.cu.fake_declare(0, ctypes.c_void_p(begin), ctypes.c_size_t(size))
    assert face.to_host(target, memory, side, 100) == face.to_host(target + 100, memory + 100, side, 100) == 0
    assert face.to_host(target, memory, side, 200) == 1
    face.found("joins two allocations")


def test_a_copy_to_memory_that_is_registered_in_part(face: Face) -> None:
    memory, target, side = face.allocation(2 * PAGE), face.host(2 * PAGE), face.stream()
    assert face.register(target, PAGE) == 0
    assert face.to_host(target, memory, side, PAGE) == 0
    assert face.to_host(target, memory, side, PAGE + 1) == 1
    face.found("registered in part")
    face.wait(side)
    assert face.unregister(target) == 0


def test_registrations(face: Face) -> None:
    memory = face.host(3 * PAGE)
    assert face.register(memory, PAGE) == 0
    assert face.register(memory, PAGE) == face.register(memory + 100, 2 * PAGE) == 712
    assert face.register(memory + PAGE, PAGE) == 0
    assert face.unregister(memory + 1) == 713
    assert face.unregister(memory) == face.unregister(memory + PAGE) == 0
    assert face.unregister(memory) == 713


@pytest.mark.parametrize("waits", [True, False])
def test_memory_is_given_back_when_nothing_goes_on_there(face: Face, waits: bool) -> None:
    target, side, address = face.host(), face.stream(), ctypes.c_ulonglong()
    face.do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(SIZE))
    assert face.register(target) == 0
    before = face.fake.alive()["frees of memory in use"]
    assert face.to_host(target, address.value, side) == 0
    if waits:
        face.wait(side)
    assert face.unregister(target) == 0
    face.found(*[] if waits else ["cuMemHostUnregister gives up", "while it may be in use", "cuMemcpyDtoHAsync"])
    face.do("cuMemFree_v2", address)
    face.found(*[] if waits else ["cuMemFree gives up", "while it may be in use"])
    assert face.code("cuMemFree_v2", address) == 1
    face.fake.before["frees of memory in use"] += face.fake.alive()["frees of memory in use"] - before


def test_the_memory_of_a_device_is_limited(face: Face) -> None:
    free, total, address = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_ulonglong()
    face.fake.set_memory(total=1 << 40, others=0)
    face.allocation(1000)  # first: it may lie where tests of before have told of memory, which is forgotten then
    face.do("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    used = total.value - free.value  # by tests of before, too
    assert used >= 1000
    left = face.fake.lost[0]  # which is among both
    face.fake.set_memory(total=9_000 + used, others=5_000 + left)
    face.do("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    assert (free.value, total.value) == (4000, 9_000 + used)
    assert face.code("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(4001)) == 2
    face.allocation(4000)


def test_pointers_tell_their_allocation(face: Face) -> None:
    memory, begin, size = face.allocation(100), ctypes.c_ulonglong(), ctypes.c_size_t()
    face.do("cuMemGetAddressRange_v2", ctypes.byref(begin), ctypes.byref(size), ctypes.c_ulonglong(memory + 7))
    assert (begin.value, size.value) == (memory, 100)
    face.do("cuPointerGetAttribute", ctypes.byref(size), 12, ctypes.c_ulonglong(memory + 99))
    assert size.value == 100
    assert face.code("cuPointerGetAttribute", ctypes.byref(size), 12, ctypes.c_ulonglong(face.host())) == 1


def test_pageable_memory_is_waited_for_and_holds_others_up(face: Face) -> None:
    memory, target, side, version = face.allocation(), face.host(), face.stream(), ctypes.c_int()
    face.kernel(memory, side, 9)
    face.fake.hold_copies(True)
    copying = threading.Thread(target=lambda: (face.fake.make_current(0), face.to_host(target, memory, side)))
    copying.start()
    while face.fake.count("pageable copies") == 0:
        pass
    asking = threading.Thread(target=lambda: face.do("cuDriverGetVersion", ctypes.byref(version)))
    asking.start()
    asking.join(0.05)
    assert asking.is_alive()
    face.fake.hold_copies(False)
    asking.join()
    copying.join()
    assert bytes_at(target) == {9}
    assert face.batch([(target, memory)], side)[0] == 1, "batches take pinned memory alone"


# ---- contexts, handles, errors ---------------------------------------------------------------------------------------


def test_without_a_context(face: Face) -> None:
    event = face.event()
    face.do("cuCtxSetCurrent", None)
    for code in (
        face.code("cuEventQuery", event), face.code("cuEventRecord", event, None), face.to_host(1, 1, None),
        face.code("cuStreamQuery", None), face.register(face.host()),
    ):  # fmt: skip
        assert code == 201
    face.fake.make_current(0)
    assert face.code("cuEventQuery", event) == 0


def test_events_and_streams_of_two_devices(face: Face) -> None:
    event, here, there = face.event(), face.stream(), ctypes.c_void_p(face.fake.stream(1))
    assert face.code("cuEventRecord", event, there) == 400
    face.do("cuEventRecord", event, here)
    face.do("cuStreamWaitEvent", there, event, 0)
    face.found()


def test_destroyed_handles(face: Face) -> None:
    stream, event = ctypes.c_void_p(), ctypes.c_void_p()
    face.do("cuStreamCreateWithPriority", ctypes.byref(stream), 0, 0)
    face.do("cuEventCreate", ctypes.byref(event), 2)
    face.do("cuStreamDestroy_v2", stream)
    face.do("cuEventDestroy_v2", event)
    assert face.code("cuStreamQuery", stream) == 400
    face.found("destroyed stream")
    assert face.code("cuEventDestroy_v2", event) == 400
    face.found("destroyed event")
    assert face.code("cuEventQuery", ctypes.c_void_p(12345)) == 400
    face.found("no event's")


def test_an_operation_that_fails_ends_its_context(face: Face) -> None:
    memory, target, side = face.allocation(), face.pinned(), face.stream()
    event = face.event()
    face.cu.fake_fail(b"cuMemcpyDtoHAsync", ctypes.c_int64(0), ILLEGAL_ADDRESS, 1)
    assert face.to_host(target, memory, side) == 0
    assert face.code("cuStreamSynchronize", side) == ILLEGAL_ADDRESS
    for code in (face.code("cuEventRecord", event, side), face.code("cuEventQuery", event), face.to_host(target, memory, side)):
        assert code == ILLEGAL_ADDRESS
    face.fake.make_current(1)
    assert face.code("cuCtxSynchronize") == 0, "the other device goes on"
    face.fake.make_current(0)
    face.fake.configure()


def test_before_and_after(fake_library: Path, tmp_path: Path) -> None:
    own = tmp_path / "libown.so"  # whose state is its own
    shutil.copy(fake_library, own)
    cu, count, context = ctypes.CDLL(str(own)), ctypes.c_int(), ctypes.c_void_p()
    assert cu.cuDeviceGetCount(ctypes.byref(count)) == 3
    with loaded(own) as fake:
        assert fake.cu.cuCtxGetCurrent(ctypes.byref(context)) == 0 and context.value
        fake.cu.fake_shut_down()
        for call in (lambda: cu.cuDeviceGetCount(ctypes.byref(count)), cu.cuCtxSynchronize, lambda: cu.cuMemFree_v2(1)):
            assert call() == 4


def test_a_driver_that_has_ended_holds_no_memory(fake_library: Path, tmp_path: Path) -> None:
    own = tmp_path / "libown.so"
    shutil.copy(fake_library, own)
    with loaded(own) as fake:
        face = Face(fake)
        memory = face.host()
        assert face.register(memory) == 0
        fake.cu.fake_shut_down()
        assert face.unregister(memory) == 4
        fake.configure()
        assert face.register(memory) == face.unregister(memory) == 0


def test_the_last_release_ends_a_context(fake_library: Path, tmp_path: Path) -> None:
    own = tmp_path / "libown.so"
    shutil.copy(fake_library, own)
    cu, context, event = ctypes.CDLL(str(own)), ctypes.c_void_p(), ctypes.c_void_p()
    assert cu.cuInit(0) == 0
    for _ in range(2):
        assert cu.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert cu.cuCtxSetCurrent(context) == cu.cuEventCreate(ctypes.byref(event), 0) == 0
    assert cu.cuDevicePrimaryCtxRelease_v2(0) == cu.cuEventQuery(event) == 0
    assert cu.cuDevicePrimaryCtxRelease_v2(0) == 0
    assert cu.cuEventQuery(event) == 709
    assert cu.cuDevicePrimaryCtxRelease_v2(0) == cu.cuCtxSetCurrent(context) == 201
