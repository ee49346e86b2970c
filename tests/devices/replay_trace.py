"""Plays a trace that the checking proxy has written to another driver, and says what that finds.

`python replay_trace.py TRACE --driver strict`: or `random`, `proxy` (in front of `random`), or the file of a driver.
Each thread of the trace has one here, and calls are made in its order. Questions that were answered by "done" are asked until
they are.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import ctypes
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fake_driver
from support import DEADLINE_S

PAGE = 4096
NOT_READY = 600
DEVICES = 8
SPARE = 1 << 20  # behind each piece of memory, for copies that go beyond it


class Memory:
    """What takes the place of the trace's memory."""

    def __init__(self) -> None:
        self.pieces: dict[int, tuple[int, int]] = {}  # where it began -> its bytes, where it begins here
        self.keeps: list[Any] = []

    def put(self, begin: int, size: int, here: int | None = None) -> int:
        if here is None:
            buffer = ctypes.create_string_buffer(size + SPARE + 2 * PAGE)
            self.keeps.append(buffer)
            here = -(-ctypes.addressof(buffer) // PAGE) * PAGE + begin % PAGE
        for other in [at for at, (its, _) in self.pieces.items() if at < begin + size and begin < at + its]:
            del self.pieces[other]
        self.pieces[begin] = size, here
        return here

    def find(self, address: int, size: int) -> int:
        for begin, (length, here) in self.pieces.items():
            if begin <= address < begin + length:
                return here + address - begin
        return self.put(address, size)  # pageable memory


class Replay:
    def __init__(self, cu: ctypes.CDLL) -> None:
        self.cu, self.memory = cu, Memory()
        self.handles: dict[str, ctypes.c_void_p] = {name: ctypes.c_void_p(int(name)) for name in ("0", "1", "2")}
        self.handles["c0"] = ctypes.c_void_p()
        self.threads: dict[str, concurrent.futures.ThreadPoolExecutor] = {}
        self.differences: list[str] = []
        self.called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)

    def run(self, lines: list[str]) -> None:
        for line in lines:
            words = line.split()
            thread, name, *arguments = words
            expected = 0
            if len(arguments) > 1 and arguments[-2] == "=":
                expected = int(arguments[-1])
                arguments = arguments[:-2]
            if thread not in self.threads:
                self.threads[thread] = concurrent.futures.ThreadPoolExecutor(1)
            code = self.threads[thread].submit(self.act, name, arguments, expected).result()
            if code != expected:
                self.differences.append(f"{line.strip()}: {code} instead of {expected}")
        for thread in self.threads.values():
            thread.shutdown()

    def act(self, name: str, arguments: list[str], expected: int) -> int:
        known = getattr(self, f"do_{name}", None)
        if known is not None:
            return int(known(*arguments) or 0)
        deadline = time.monotonic() + DEADLINE_S
        given = [self.argument(each) for each in arguments]
        while (code := int(getattr(self.cu, name)(*given))) == NOT_READY != expected and time.monotonic() < deadline:
            time.sleep(0.0001)
        return code

    def argument(self, word: str) -> Any:
        if word[0] in "sec":
            return self.handles[word]
        return ctypes.c_ulonglong(int(word, 16)) if word.startswith("0x") else ctypes.c_int(int(word))

    def make(self, call: str, name: str, *arguments: Any) -> int:
        self.handles[name] = ctypes.c_void_p()
        return int(getattr(self.cu, call)(ctypes.byref(self.handles[name]), *arguments))

    # ---- what others had made ----------------------------------------------------------------------------------------

    def do_context(self, name: str, device: str) -> int:
        if hasattr(self.cu, "fake_green_context"):
            self.cu.fake_green_context.restype = ctypes.c_void_p
            self.handles[name] = ctypes.c_void_p(self.cu.fake_green_context(int(device)))
            return 0
        return self.make("cuDevicePrimaryCtxRetain", name, int(device))

    def do_stream(self, name: str, device: str, flags: str) -> int:
        return self.make("cuStreamCreateWithPriority", name, int(flags), 0)

    def do_memory(self, device: str, begin: str, size: str) -> None:
        here = self.memory.put(int(begin, 16), int(size))
        if hasattr(self.cu, "fake_declare"):
            self.cu.fake_declare(int(device), ctypes.c_void_p(here), ctypes.c_size_t(int(size)))

    # ---- what the proxy's tests had done -----------------------------------------------------------------------------

    def do_kernel(self, device: str, begin: str, size: str, value: str, stream: str) -> None:
        here = self.memory.find(int(begin, 16), int(size))
        self.cu.fake_fill(int(device), self.handles[stream], ctypes.c_void_p(here), int(value), ctypes.c_size_t(int(size)))

    def do_synchronize(self, device: str, stream: str) -> None:
        self.cu.fake_synchronize(int(device), self.handles[stream])

    def do_learn(self) -> None:
        if hasattr(self.cu, "fake_learn"):
            self.cu.fake_learn()

    def do_touch(self, begin: str, size: str, is_write: str) -> None:
        if hasattr(self.cu, "fake_touch"):
            here = self.memory.find(int(begin, 16), int(size))
            self.cu.fake_touch(ctypes.c_void_p(here), ctypes.c_size_t(int(size)), int(is_write))

    def do_forget(self) -> None:
        if hasattr(self.cu, "fake_forget"):
            while not self.cu.fake_forget():
                time.sleep(0.001)

    # ---- calls -------------------------------------------------------------------------------------------------------

    def do_cuDevicePrimaryCtxRetain(self, device: str, name: str) -> int:
        return self.make("cuDevicePrimaryCtxRetain", name, int(device))

    def do_cuStreamCreateWithPriority(self, flags: str, priority: str, name: str) -> int:
        return self.make("cuStreamCreateWithPriority", name, int(flags), int(priority))

    def do_cuEventCreate(self, flags: str, name: str) -> int:
        return self.make("cuEventCreate", name, int(flags))

    def do_cuStreamWaitEvent(self, stream: str, event: str) -> int:
        return int(self.cu.cuStreamWaitEvent(self.handles[stream], self.handles[event], 0))

    def do_cuThreadExchangeStreamCaptureMode(self, mode: str) -> int:
        return int(self.cu.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(int(mode)))))

    def do_cuMemAlloc_v2(self, begin: str, size: str) -> int:
        address = ctypes.c_ulonglong()
        code = int(self.cu.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(int(size))))
        self.memory.put(int(begin, 16), int(size), address.value)
        return code

    def do_cuMemFree_v2(self, begin: str) -> int:
        return int(self.cu.cuMemFree_v2(ctypes.c_ulonglong(self.memory.find(int(begin, 16), 1))))

    def do_cuMemHostRegister_v2(self, begin: str, size: str, flags: str) -> int:
        here = self.memory.put(int(begin, 16), int(size))
        return int(self.cu.cuMemHostRegister_v2(ctypes.c_void_p(here), ctypes.c_size_t(int(size)), int(flags)))

    def do_cuMemHostUnregister(self, begin: str) -> int:
        return int(self.cu.cuMemHostUnregister(ctypes.c_void_p(self.memory.find(int(begin, 16), 1))))

    def copy(self, call: str, to: str, source: str, size: str, stream: str) -> int:
        bytes_ = int(size)
        here, there = (ctypes.c_ulonglong(self.memory.find(int(side, 16), bytes_)) for side in (to, source))
        return int(getattr(self.cu, call)(here, there, ctypes.c_size_t(bytes_), self.handles[stream]))

    def do_cuMemcpyDtoHAsync_v2(self, *arguments: str) -> int:
        return self.copy("cuMemcpyDtoHAsync_v2", *arguments)

    def do_cuMemcpyHtoDAsync_v2(self, *arguments: str) -> int:
        return self.copy("cuMemcpyHtoDAsync_v2", *arguments)

    def do_cuMemcpyDtoDAsync_v2(self, *arguments: str) -> int:
        return self.copy("cuMemcpyDtoDAsync_v2", *arguments)

    def do_cuMemcpyBatchAsync(self, stream: str, *copies: str) -> int:
        count = len(copies) // 3
        sizes = [int(size) for size in copies[2::3]]
        sides = [[self.memory.find(int(at, 16), size) for at, size in zip(copies[n::3], sizes, strict=True)] for n in (0, 1)]
        to, source = ((ctypes.c_ulonglong * count)(*side) for side in sides)
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        return int(self.cu.cuMemcpyBatchAsync(
            to, source, (ctypes.c_size_t * count)(*sizes), ctypes.c_size_t(count), (ctypes.c_int * 6)(1), ctypes.byref(first),
            ctypes.c_size_t(1), ctypes.byref(failed), self.handles[stream],
        ))  # fmt: skip

    def do_cuMemsetD8Async(self, to: str, value: str, size: str, stream: str) -> int:
        here = ctypes.c_ulonglong(self.memory.find(int(to, 16), int(size)))
        return int(self.cu.cuMemsetD8Async(here, ctypes.c_ubyte(int(value)), ctypes.c_size_t(int(size)), self.handles[stream]))

    def do_cuLaunchHostFunc(self, stream: str) -> int:
        return int(self.cu.cuLaunchHostFunc(self.handles[stream], self.called, None))


def kinds_of(violations: list[str]) -> collections.Counter[str]:
    """How often each is told of, whatever the addresses and numbers."""
    plain = (re.sub(r"0x[0-9a-f]+", "ADDRESS", each) for each in violations)
    return collections.Counter(re.sub(r"(number|stream|thread) \d+", r"\1 N", each) for each in plain)


def replay(trace: Path, library: Path) -> tuple[list[str], list[str]]:
    """What the driver tells of, and which calls have returned something else."""
    lines = trace.read_text(encoding="utf-8").splitlines()
    cu = ctypes.CDLL(str(library))
    cu.cuInit(0)
    if hasattr(cu, "fake_configure"):
        cu.fake_configure(DEVICES, ctypes.c_uint64(0), ctypes.c_double(0))
    tells = hasattr(cu, "fake_violations")
    if tells:
        cu.fake_violations.restype = ctypes.c_char_p
        cu.fake_violations()
    playing = Replay(cu)
    playing.run(lines)
    return cu.fake_violations().decode().splitlines() if tells else [], playing.differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--driver", default="strict")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        library = Path(chosen.driver)
        if chosen.driver in (*fake_driver.SOURCES, "proxy"):
            behind = fake_driver.build(Path(directory), kind="random" if chosen.driver == "proxy" else chosen.driver)
            library = fake_driver.build_proxy(Path(directory), behind) if chosen.driver == "proxy" else behind
        violations, differences = replay(chosen.trace, library)
    sys.stdout.write("".join(f"{each}\n" for each in [*violations, *differences]))
    sys.stdout.write(f"{len(violations)} rules broken, {len(differences)} calls that returned something else\n")
    return int(bool(violations or differences))


if __name__ == "__main__":
    sys.exit(main())
