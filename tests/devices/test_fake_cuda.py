"""The fake CUDA driver keeps the order of the real one: else what is tested with it would be tested for nothing."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

import pytest
from fake_driver import DEFAULT_STREAM, ILLEGAL_ADDRESS, NOT_READY, FakeCuda, cuda, fake_library

__all__ = ["cuda", "fake_library"]
pytestmark = pytest.mark.parametrize("fake_library", ["random"], indirect=True)

POISON = b"\xa5"


class Events:
    def __init__(self, fake: FakeCuda) -> None:
        self.fake, self.made = fake, list[ctypes.c_void_p]()

    def make(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self.fake.call("cuEventCreate", ctypes.byref(event), 3)
        self.made.append(event)
        return event

    def record(self, stream: int) -> ctypes.c_void_p:
        event = self.make()
        self.fake.call("cuEventRecord", event, ctypes.c_void_p(stream))
        return event


@pytest.fixture
def events(cuda: FakeCuda) -> Iterator[Events]:
    made = Events(cuda)
    yield made
    for event in made.made:
        cuda.call("cuEventDestroy_v2", event)


def copy_out(cuda: FakeCuda, to: ctypes.Array, source: ctypes.Array, stream: int) -> None:
    cuda.call(
        "cuMemcpyDtoHAsync_v2", to, ctypes.c_ulonglong(ctypes.addressof(source)), ctypes.c_size_t(len(source)),
        ctypes.c_void_p(stream),
    )  # fmt: skip


def register(cuda: FakeCuda, memory: ctypes.Array) -> None:
    cuda.call("cuMemHostRegister_v2", memory, ctypes.c_size_t(len(memory)), 1)


def test_a_copy_reads_when_its_turn_comes_and_leaves_poison_until_then(cuda: FakeCuda, events: Events) -> None:
    source, target = (ctypes.c_char * 64)(*b"a" * 64), (ctypes.c_char * 64)()
    register(cuda, target)
    stream = cuda.stream()
    cuda.hold_copies(True)
    copy_out(cuda, target, source, stream)
    done = events.record(stream)
    assert target.raw == POISON * 64
    assert cuda.cu.cuEventQuery(done) == NOT_READY
    source[:] = b"b" * 64
    cuda.hold_copies(False)
    cuda.call("cuEventSynchronize", done)
    assert target.raw == b"b" * 64
    cuda.call("cuMemHostUnregister", target)
    assert (cuda.count("pinned copies"), cuda.count("pageable copies")) == (1, 0)


def test_a_copy_to_pageable_memory_is_waited_for(cuda: FakeCuda) -> None:
    source, target = (ctypes.c_char * 8)(*b"12345678"), (ctypes.c_char * 8)()
    cuda.configure(most_delay_s=0.01)
    copy_out(cuda, target, source, cuda.stream())
    assert target.raw == b"12345678"
    assert (cuda.count("pinned copies"), cuda.count("pageable copies")) == (0, 1)


def test_work_waits_for_the_event_of_another_stream(cuda: FakeCuda, events: Events) -> None:
    source, target = (ctypes.c_char * 64)(*b"a" * 64), (ctypes.c_char * 64)()
    register(cuda, target)
    side, compute = cuda.stream(0), cuda.stream(1)
    cuda.hold_copies(True)
    copy_out(cuda, target, source, side)
    copied = events.record(side)
    cuda.make_current(1)
    cuda.call("cuStreamWaitEvent", ctypes.c_void_p(compute), copied, 0)
    cuda.make_current(0)
    cuda.fill(1, compute, ctypes.addressof(source), ord("x"), 64)
    time.sleep(0.02)
    assert source.raw == b"a" * 64
    cuda.hold_copies(False)
    cuda.synchronize(1, compute)
    assert (source.raw, target.raw) == (b"x" * 64, b"a" * 64)
    cuda.call("cuMemHostUnregister", target)


def test_work_without_an_event_does_not_wait(cuda: FakeCuda) -> None:
    source, target = (ctypes.c_char * 64)(*b"a" * 64), (ctypes.c_char * 64)()
    register(cuda, target)
    side, compute = cuda.stream(), cuda.stream()
    cuda.hold_copies(True)
    copy_out(cuda, target, source, side)
    cuda.fill(0, compute, ctypes.addressof(source), ord("x"), 64)
    cuda.synchronize(0, compute)
    cuda.hold_copies(False)
    cuda.synchronize(0, side)
    assert target.raw == b"x" * 64, "the fake would hide a missing wait"
    cuda.call("cuMemHostUnregister", target)


def test_a_failed_copy_is_told_by_the_next_event_alone(cuda: FakeCuda, events: Events) -> None:
    source, target = (ctypes.c_char * 8)(), (ctypes.c_char * 8)()
    cuda.fail("cuMemcpyDtoHAsync", skip=1, late=True)
    stream = cuda.stream()
    for expected in (0, ILLEGAL_ADDRESS, 0):
        copy_out(cuda, target, source, stream)
        assert cuda.cu.cuEventSynchronize(events.record(stream)) == expected


def test_a_copy_stays_inside_an_allocation(cuda: FakeCuda) -> None:
    source, target = (ctypes.c_char * 64)(*b"a" * 64), (ctypes.c_char * 64)()
    begin, invalid_value = ctypes.addressof(source), 1
    for at in (0, 32):
        cuda.allocated(begin + at, 32)
    for at, length, code in ((0, 32, 0), (32, 32, 0), (8, 24, 0), (0, 64, invalid_value), (31, 2, invalid_value)):
        arguments = (target, ctypes.c_ulonglong(begin + at), ctypes.c_size_t(length), ctypes.c_void_p(DEFAULT_STREAM))
        assert cuda.cu.cuMemcpyDtoHAsync_v2(*arguments) == code
    for at in (0, 32):
        cuda.allocated(begin + at, 0)


def batch(cuda: FakeCuda, targets: list[ctypes.Array], sources: list[ctypes.Array], stream: int) -> tuple[int, int]:
    """What the call returns, and which copy it names."""
    count, first, failed = len(targets), ctypes.c_size_t(0), ctypes.c_size_t(99)
    addresses = [(ctypes.c_ulonglong * count)(*map(ctypes.addressof, each)) for each in (targets, sources)]
    sizes = (ctypes.c_size_t * count)(*map(len, targets))
    attributes = (ctypes.c_int * 6)(1)
    code = cuda.cu.cuMemcpyBatchAsync(
        *addresses, sizes, ctypes.c_size_t(count), attributes, ctypes.byref(first), ctypes.c_size_t(1), ctypes.byref(failed),
        ctypes.c_void_p(stream),
    )  # fmt: skip
    return code, failed.value


def test_a_batch_of_copies(cuda: FakeCuda) -> None:
    sources = [(ctypes.c_char * 8)(*bytes([97 + i] * 8)) for i in range(3)]
    memory = (ctypes.c_char * 24)()
    targets = [(ctypes.c_char * 8).from_buffer(memory, 8 * i) for i in range(3)]
    stream = cuda.stream()
    assert batch(cuda, targets, sources, stream) == (1, 0), "not registered"
    register(cuda, memory)
    assert batch(cuda, targets, sources, DEFAULT_STREAM)[0] == 1
    cuda.hold_copies(True)
    assert batch(cuda, targets, sources, stream)[0] == 0
    assert memory.raw == POISON * 24
    cuda.hold_copies(False)
    cuda.synchronize(0, stream)
    assert memory.raw == b"aaaaaaaabbbbbbbbcccccccc"
    memory[:] = bytes(24)
    cuda.fail("batched copies", skip=2, code=801)
    assert batch(cuda, targets, sources, stream) == (801, 2)
    cuda.synchronize(0, stream)
    assert memory.raw == b"aaaaaaaabbbbbbbb" + bytes(8)
    cuda.call("cuMemHostUnregister", memory)


def test_the_nth_call_fails(cuda: FakeCuda) -> None:
    cuda.fail("cuDriverGetVersion", skip=1, code=2)
    version = ctypes.c_int()
    assert [cuda.cu.cuDriverGetVersion(ctypes.byref(version)) for _ in range(3)] == [0, 2, 0]
    assert cuda.count("cuDriverGetVersion") == 3


def test_handles_belong_to_a_device(cuda: FakeCuda, events: Events) -> None:
    invalid_context, invalid_handle = 201, 400
    other = cuda.stream(1)
    event = events.make()
    assert cuda.cu.cuEventRecord(event, ctypes.c_void_p(other)) == invalid_handle
    cuda.call("cuCtxSetCurrent", None)
    assert cuda.cu.cuEventRecord(event, ctypes.c_void_p(DEFAULT_STREAM)) == invalid_context
    cuda.make_current(0)


def test_capture_and_priority_are_seen(cuda: FakeCuda) -> None:
    stream, status = cuda.stream(), ctypes.c_int()
    cuda.set_capturing(0, stream, True)
    cuda.call("cuStreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(status))
    assert status.value == 1
    cuda.set_capturing(0, stream, False)
    assert (cuda.count("streams of the lowest priority"), cuda.count("streams of another priority")) == (0, 1)
