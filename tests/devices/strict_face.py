"""The face of the strict model of the CUDA driver, for the tests of the model itself."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_driver import FakeCuda, cuda, fake_library

__all__ = ["cuda", "fake_library"]

NON_BLOCKING = 1
SIZE = 4096
PAGE = 4096


class Face:
    """The driver's face, with what a test makes there; it is given back at the end."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake, self.cu = fake, fake.cu
        self.ends: list[Callable[[], None]] = []
        self.keeps: list[Any] = []

    def code(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.cu, name)(*arguments))

    def do(self, name: str, *arguments: Any) -> None:
        assert self.code(name, *arguments) == 0, name

    def stream(self, flags: int = NON_BLOCKING) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.do("cuStreamCreateWithPriority", ctypes.byref(handle), flags, 0)
        self.ends.append(lambda: self.do("cuStreamDestroy_v2", handle))
        return handle

    def event(self) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.do("cuEventCreate", ctypes.byref(handle), 2)
        self.ends.append(lambda: self.do("cuEventDestroy_v2", handle))
        return handle

    def recorded(self, stream: Any) -> ctypes.c_void_p:
        event = self.event()
        self.do("cuEventRecord", event, stream)
        return event

    def allocation(self, size: int = SIZE) -> int:
        address = ctypes.c_ulonglong()
        self.do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self.ends.insert(0, lambda: self.do("cuMemFree_v2", address))
        return address.value

    def host(self, size: int = SIZE) -> int:
        """Pageable memory that shares no page with other memory."""
        memory = ctypes.create_string_buffer(size + 2 * PAGE)
        self.keeps.append(memory)
        return -(-ctypes.addressof(memory) // PAGE) * PAGE

    def register(self, address: int, size: int = SIZE) -> int:
        return self.code("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), 1)

    def unregister(self, address: int) -> int:
        return self.code("cuMemHostUnregister", ctypes.c_void_p(address))

    def pinned(self, size: int = SIZE) -> int:
        address = self.host(size)
        assert self.register(address, size) == 0
        self.ends.insert(0, lambda: self.do("cuMemHostUnregister", ctypes.c_void_p(address)))
        return address

    def to_host(self, to: int, source: int, stream: Any, size: int = SIZE) -> int:
        arguments = (ctypes.c_void_p(to), ctypes.c_ulonglong(source), ctypes.c_size_t(size), stream)
        return self.code("cuMemcpyDtoHAsync_v2", *arguments)

    def on_device(self, to: int, source: int, stream: Any, size: int = SIZE) -> int:
        arguments = (ctypes.c_ulonglong(to), ctypes.c_ulonglong(source), ctypes.c_size_t(size), stream)
        return self.code("cuMemcpyDtoDAsync_v2", *arguments)

    def batch(self, pairs: list[tuple[int, int]], stream: Any, size: int = SIZE) -> tuple[int, int]:
        count, first, failed = len(pairs), ctypes.c_size_t(0), ctypes.c_size_t(0)
        to, source = ((ctypes.c_ulonglong * count)(*side) for side in zip(*pairs, strict=True))
        sizes, attributes = (ctypes.c_size_t * count)(*[size] * count), (ctypes.c_int * 6)(1)
        code = self.code(
            "cuMemcpyBatchAsync", to, source, sizes, ctypes.c_size_t(count), attributes, ctypes.byref(first),
            ctypes.c_size_t(1), ctypes.byref(failed), stream,
        )  # fmt: skip
        return code, failed.value

    def kernel(self, address: int, stream: Any, value: int = 1, size: int = SIZE) -> None:
        self.fake.fill(0, stream.value if stream else 0, address, value, size, told=False)

    def wait(self, stream: Any) -> None:
        self.do("cuStreamSynchronize", stream)

    def found(self, *parts: str) -> None:
        """One violation, that tells all of it; or none."""
        violations = self.fake.violations()
        assert len(violations) == bool(parts), violations
        for part in parts:
            assert part in violations[0]


@pytest.fixture
def face(cuda: FakeCuda) -> Iterator[Face]:
    made = Face(cuda)
    yield made
    cuda.hold_copies(False)
    made.do("cuCtxSynchronize")
    for end in made.ends:
        end()


def bytes_at(address: int, size: int = SIZE) -> set[int]:
    return set(ctypes.string_at(address, size))


def in_thread(act: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]
