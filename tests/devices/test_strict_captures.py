"""The strict model of the CUDA driver knows what breaks a stream capture, and who may do what meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
from strict_face import NON_BLOCKING, SIZE, Face, bytes_at, cuda, face, fake_library, in_thread

__all__ = ["cuda", "face", "fake_library"]
pytestmark = pytest.mark.parametrize("fake_library", ["strict"], indirect=True)

GLOBAL, THREAD_LOCAL, RELAXED = range(3)


def capturing(face: Face, stream: Any) -> int:
    status = ctypes.c_int(-1)
    face.do("cuStreamIsCapturing", stream, ctypes.byref(status))
    return status.value


def unsafe_calls(face: Face) -> list[Callable[[], int]]:
    event, memory, address = face.event(), face.host(), ctypes.c_ulonglong()
    return [
        lambda: face.code("cuEventQuery", event),
        lambda: face.register(memory),
        lambda: face.code("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(1)),
        lambda: face.code("cuCtxSynchronize"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_global_capture_forbids_unsafe_calls_of_all_threads(face: Face, number: int) -> None:
    stream = face.stream()
    call = unsafe_calls(face)[number]
    for runner in (lambda: call(), lambda: in_thread(lambda: (face.fake.make_current(0), call())[1])):
        face.do("cuStreamBeginCapture_v2", stream, GLOBAL)
        assert capturing(face, stream) == 1
        assert runner() == 900
        assert capturing(face, stream) == 2
        face.found("breaks the capture", "900")
        assert face.on_device(face_memory(face), face_memory(face), stream) == 901
        assert face.code("cuStreamEndCapture", stream, None) == 901


def face_memory(face: Face) -> int:
    memory = face.host()
    face.cu.fake_declare(0, ctypes.c_void_p(memory), ctypes.c_size_t(SIZE))
    return memory


@pytest.mark.parametrize(
    ("mode", "by_thread"), [(RELAXED, GLOBAL), (THREAD_LOCAL, GLOBAL), (GLOBAL, RELAXED), (GLOBAL, THREAD_LOCAL)]
)
def test_a_thread_that_is_allowed_to(face: Face, mode: int, by_thread: int) -> None:
    stream, event = face.stream(), face.event()
    face.do("cuStreamBeginCapture_v2", stream, mode)

    def ask() -> int:
        before = ctypes.c_int(by_thread)
        face.fake.make_current(0)
        face.do("cuThreadExchangeStreamCaptureMode", ctypes.byref(before))
        assert before.value == GLOBAL
        return face.code("cuEventQuery", event)

    assert in_thread(ask) == 0
    face.do("cuStreamEndCapture", stream, None)
    face.found()


@pytest.mark.parametrize(("number", "code"), [*enumerate([900, 900, 905, 900, 907])])
def test_what_breaks_a_capture_in_any_mode(face: Face, number: int, code: int) -> None:
    stream, outside = face.stream(), face.recorded(face.stream())
    memory, other, captured = face_memory(face), face_memory(face), face.event()
    face.do("cuStreamBeginCapture_v2", stream, RELAXED)
    face.do("cuEventRecord", captured, stream)
    calls: list[Callable[[], int]] = [
        lambda: face.code("cuStreamQuery", stream),
        lambda: face.code("cuStreamSynchronize", stream),
        lambda: face.code("cuStreamWaitEvent", stream, outside, 0),
        lambda: face.batch([(memory, other)], stream)[0],
        lambda: face.code("cuEventQuery", captured),
    ]
    assert calls[number]() == code
    face.found("breaks the capture", str(code))
    assert face.code("cuStreamEndCapture", stream, None) == 901


@pytest.mark.parametrize("flags", [0, NON_BLOCKING], ids=["blocking", "non_blocking"])
def test_the_default_stream_during_a_capture(face: Face, flags: int) -> None:
    stream, status = face.stream(flags), ctypes.c_int()
    face.do("cuStreamBeginCapture_v2", stream, RELAXED)
    expected = 0 if flags else 906
    assert face.code("cuStreamIsCapturing", None, ctypes.byref(status)) == expected
    assert capturing(face, stream) == 1, "the question harms nothing"
    assert face.code("cuEventRecord", face.event(), None) == expected
    assert capturing(face, stream) == (1 if flags else 2)
    face.found(*[] if flags else ["breaks the capture", "906"])
    assert face.code("cuStreamEndCapture", stream, None) == (0 if flags else 901)


def test_what_is_captured_is_done_when_it_is_replayed(face: Face) -> None:
    memory, stream, target = face.allocation(), face.stream(), face.pinned()
    face.kernel(memory, stream, 1)
    face.wait(stream)
    face.fake.set_capturing(0, stream.value or 0, True)
    face.kernel(memory, stream, 2)
    face.fake.set_capturing(0, stream.value or 0, False)
    assert face.to_host(target, memory, face.stream()) == 0
    face.do("cuCtxSynchronize")
    assert bytes_at(target) == {1}
    assert face.to_host(target, memory, face.stream()) == 0
    face.cu.fake_replay(0, stream, stream)
    face.found("race", "a kernel")
    face.wait(stream)
    assert bytes_at(memory) == {2}
