"""The strict model of the CUDA driver: functions of the host in streams, writes by the driver, owners, engines."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fake_driver import ILLEGAL_ADDRESS, NOT_READY
from strict_face import NON_BLOCKING, SIZE, Face, bytes_at, cuda, face, fake_library
from support import DEADLINE_S, wait_until

__all__ = ["cuda", "face", "fake_library"]
pytestmark = pytest.mark.parametrize("fake_library", ["strict"], indirect=True)

NOT_PERMITTED = 800


def launch(face: Face, stream: Any, act: Callable[[], Any]) -> int:
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: (act(), None)[1])
    face.keeps.append(function)
    return face.code("cuLaunchHostFunc", stream, function, None)


def fill(face: Face, stream: Any, address: int, value: int, size: int = SIZE) -> int:
    return face.code("cuMemsetD8Async", ctypes.c_ulonglong(address), ctypes.c_ubyte(value), ctypes.c_size_t(size), stream)


# ---- functions -------------------------------------------------------------------------------------------------------


def test_a_function_has_its_place_in_its_stream(face: Face) -> None:
    """What stands before it has been done, what stands behind it waits, and other streams go on."""
    memory, target, side, other = face.allocation(), face.pinned(), face.stream(), face.stream()
    seen: list[set[int]] = []
    begun, go_on = threading.Event(), threading.Event()
    assert fill(face, side, memory, 5) == 0
    assert launch(face, side, lambda: (begun.set(), go_on.wait(DEADLINE_S), seen.append(bytes_at(memory)))) == 0
    behind = face.recorded(side)
    assert fill(face, side, memory, 6) == 0
    assert begun.wait(DEADLINE_S)
    assert face.to_host(target, face.allocation(), other) == 0
    face.wait(other)
    assert face.code("cuEventQuery", behind) == face.code("cuStreamQuery", side) == NOT_READY
    go_on.set()
    face.wait(side)
    assert seen == [{5}] and bytes_at(memory) == {6}
    face.found()


def test_a_function_may_not_call_the_driver(face: Face) -> None:
    side, codes = face.stream(), list[int]()
    assert launch(face, side, lambda: codes.append(face.code("cuStreamQuery", side))) == 0
    face.wait(side)
    assert codes == [NOT_PERMITTED]
    face.found("cuStreamQuery is called by a function that the driver has called")


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("first", ["copy", "function"])
def test_a_function_reads_in_the_order_of_its_stream(face: Face, first: str, ordered: bool) -> None:
    memory, target, copying, calling = face.allocation(), face.pinned(), face.stream(), face.stream()

    def copy(stream: Any) -> None:
        assert face.to_host(target, memory, stream) == 0

    def call(stream: Any) -> None:
        assert launch(face, stream, lambda: face.cu.fake_touch(ctypes.c_void_p(target), ctypes.c_size_t(1), 0)) == 0

    steps = [(copying, copy), (calling, call)]
    (before, one), (after, two) = steps if first == "copy" else steps[::-1]
    one(before)
    wait_until(lambda: face.code("cuStreamQuery", ctypes.c_void_p(0)) == 0)
    if ordered:
        face.do("cuStreamWaitEvent", after, face.recorded(before), 0)
        two(after)
        face.do("cuCtxSynchronize")
        return face.found()
    # Only the later of the two, in the order in which they are recorded, can be told of.
    two(after)
    face.do("cuCtxSynchronize")
    assert len(face.fake.violations()) == 1
    return None


def test_functions_are_called_one_at_a_time(face: Face) -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def act() -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        threading.Event().wait(0.001)
        with lock:
            at_once -= 1

    for _ in range(5):
        assert launch(face, face.stream(), act) == 0
    face.do("cuCtxSynchronize")
    assert most == 1


def test_a_broken_context_calls_none(face: Face) -> None:
    memory, side, called = face.allocation(), face.stream(), list[int]()
    face.cu.fake_fail(b"cuMemsetD8Async", ctypes.c_int64(0), ILLEGAL_ADDRESS, 1)
    face.fake.hold_copies(True)
    assert face.to_host(face.pinned(), memory, side) == 0
    assert fill(face, side, memory, 1) == 0
    assert launch(face, side, lambda: called.append(1)) == 0
    face.fake.hold_copies(False)
    assert face.code("cuStreamSynchronize", side) == ILLEGAL_ADDRESS
    assert called == []
    face.fake.configure()


def test_a_function_that_is_captured_is_called_at_each_replay(face: Face) -> None:
    side, called = face.stream(), list[int]()
    face.do("cuStreamBeginCapture_v2", side, 2)
    assert launch(face, side, lambda: called.append(1)) == 0
    face.do("cuStreamEndCapture", side, None)
    for _ in range(3):
        face.cu.fake_replay(0, side, side)
    face.wait(side)
    assert called == [1, 1, 1]


# ---- writes by the driver --------------------------------------------------------------------------------------------


def test_a_memset_writes_when_its_turn_comes(face: Face) -> None:
    memory, target, side = face.allocation(), face.pinned(), face.stream()
    assert fill(face, side, memory, 7) == face.to_host(target, memory, side) == fill(face, side, memory + 1, 8, 10) == 0
    face.wait(side)
    assert bytes_at(target) == {7} and bytes_at(memory) == {7, 8} and bytes_at(memory + 1, 10) == {8}
    face.found()


@pytest.mark.parametrize("first", ["memset", "copy"])
def test_a_memset_races_as_any_write(face: Face, first: str) -> None:
    memory, target, side, other = face.allocation(), face.pinned(), face.stream(), face.stream()
    acts = [lambda: fill(face, side, memory, 7), lambda: face.to_host(target, memory, other)]
    for act in acts if first == "memset" else acts[::-1]:
        assert act() == 0
    face.found("race", "cuMemsetD8Async", "cuMemcpyDtoHAsync")


def test_a_memset_stays_within_an_allocation(face: Face) -> None:
    memory, side = face.allocation(100), face.stream()
    assert fill(face, side, memory, 7, 100) == fill(face, side, memory, 7, 0) == 0
    assert fill(face, side, memory + 1, 7, 100) == 1
    face.found("cuMemsetD8Async", "crosses the end")
    assert fill(face, side, face.host(), 7) == 1
    face.found("no memory of a device")


# ---- contexts and owners ---------------------------------------------------------------------------------------------


def test_streams_tell_their_context(face: Face) -> None:
    side, there, context, own = face.stream(), ctypes.c_void_p(face.fake.stream(1)), ctypes.c_void_p(), ctypes.c_void_p()
    device = ctypes.c_int(-1)
    face.do("cuCtxGetCurrent", ctypes.byref(own))
    for stream, expected in ((side, True), (there, False), (None, True), (ctypes.c_void_p(2), True)):
        face.do("cuStreamGetCtx", stream, ctypes.byref(context))
        assert (context.value == own.value) == expected
    face.do("cuCtxGetDevice", ctypes.byref(device))
    assert device.value == 0
    face.fake.make_current(1)
    face.do("cuStreamGetCtx", None, ctypes.byref(context))
    face.do("cuCtxGetDevice", ctypes.byref(device))
    assert context.value != own.value and device.value == 1
    face.do("cuCtxSetCurrent", None)
    assert face.code("cuCtxGetDevice", ctypes.byref(device)) == face.code("cuStreamGetCtx", None, ctypes.byref(context)) == 201
    face.do("cuStreamGetCtx", side, ctypes.byref(context))
    assert context.value == own.value
    face.fake.make_current(0)


def test_a_green_context_is_another_one_of_its_device(face: Face) -> None:
    event, context, own = face.event(), ctypes.c_void_p(), ctypes.c_void_p()
    face.do("cuCtxGetCurrent", ctypes.byref(own))
    with face.fake.green_context():
        side, device = ctypes.c_void_p(face.fake.stream_in_current_context()), ctypes.c_int(-1)
        face.do("cuCtxGetDevice", ctypes.byref(device))
        face.do("cuStreamGetCtx", side, ctypes.byref(context))
        assert device.value == 0 and context.value != own.value
        assert face.code("cuEventRecord", event, side) == 400
        assert face.code("cuEventRecord", event, None) == 400
    face.do("cuStreamGetCtx", side, ctypes.byref(context))
    assert context.value != own.value
    assert face.code("cuEventRecord", event, side) == 400
    face.found()


def test_memory_of_another_device(face: Face) -> None:
    there, target = ctypes.c_void_p(face.fake.stream(1)), face.pinned()
    assert face.to_host(target, face.allocation(), there) == 0
    face.found("device 1 is given memory of device 0")
    face.do("cuStreamSynchronize", there)


def test_pinning_is_limited(face: Face) -> None:
    face.fake.limit_pinning(at_once=SIZE, altogether=2 * SIZE)
    assert face.register(face.host(2 * SIZE), SIZE + 1) == 2
    face.pinned()
    face.pinned()
    assert face.register(face.host()) == 2
    face.fake.configure()


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_an_engine_does_its_copies_in_the_order_in_which_they_become_ready(face: Face, seed: int) -> None:
    face.fake.configure(seed=seed, most_delay_s=0.003)
    streams = [face.stream(NON_BLOCKING) for _ in range(6)]
    for stream in streams:
        assert face.to_host(face.pinned(), face.allocation(), stream) == 0
    for earlier, later in itertools.pairwise(streams):
        face.wait(later)
        assert face.code("cuStreamQuery", earlier) == 0
    face.fake.configure()


def test_the_engines_of_a_device_do_not_wait_for_each_other(face: Face) -> None:
    """Nor do those of two devices."""
    memory, side, other = face.allocation(), face.stream(), face.stream()
    begun, go_on = threading.Event(), threading.Event()
    assert launch(face, side, lambda: (begun.set(), go_on.wait(DEADLINE_S))) == 0
    assert begun.wait(DEADLINE_S)
    assert face.to_host(face.pinned(), memory, side) == 0
    assert face.to_host(face.pinned(), memory, other) == face.on_device(face.allocation(), memory, other) == 0
    face.wait(other)
    assert face.code("cuStreamQuery", side) == NOT_READY
    go_on.set()
    face.wait(side)
