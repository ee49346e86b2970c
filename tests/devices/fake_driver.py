"""The stand-ins for the CUDA driver, built once and driven from Python.

`random` delays what it does by chance; `strict` reports whatever the documented order of things does not promise; `proxy`
reports it of the calls that it forwards to another driver, here to `random`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT, TESTS
from support import patience
from torch.multiprocessing.reductions import StorageWeakRef

SOURCES = {"random": TESTS / "fake_cuda" / "fake_cuda.cc", "strict": TESTS / "strict_cuda" / "strict_cuda.cc"}
PROXY = TESTS / "proxy_cuda" / "proxy_cuda.cc"
CHOSEN = os.environ.get("LAZYCKPT_TEST_DRIVER", "random")  # for the tests that do not ask for both
DEFAULT_STREAM = 0
ILLEGAL_ADDRESS = 700
NOT_READY = 600
UNLIMITED = (1 << 64) - 1
ALIVE = ("contexts", "streams", "events", "registrations", "allocations", "frees of memory in use")


def build(directory: Path, *more_flags: str, kind: str = "random") -> Path:
    """A copy of its own, which a process can load beside others, of what is compiled once for all test processes and runs."""
    target = directory / f"lib{SOURCES[kind].stem}.so"
    shutil.copyfile(compiled(command(SOURCES[kind], *more_flags)), target)
    return target


def command(source: Path, *more_flags: str) -> list[str]:
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", *more_flags]
    return [compiler, *flags, str(source), "-ldl"]


def compiled(command: list[str]) -> Path:
    """Compiles anew what a change of the command, or of any source of these drivers, may have changed."""
    digest = hashlib.blake2b(repr(command).encode(), digest_size=16)
    for path in sorted(path for source in SOURCES.values() for path in source.parent.iterdir()):
        digest.update(path.read_bytes())
    kept = ROOT / "build" / "fake-drivers" / f"{digest.hexdigest()}.so"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes want it at the same time
        if not kept.exists():
            subprocess.run([*command, "-o", f"{kept}.new"], check=True, timeout=patience(300))
            os.rename(f"{kept}.new", kept)
    return kept


def build_proxy(directory: Path, behind: Path | None = None) -> Path:
    """In front of the driver of this file; None: of the system's."""
    target = directory / f"lib{PROXY.stem}.so"
    flags = [f'-DPROXIED_DRIVER="{behind}"'] if behind else []
    subprocess.run([*command(PROXY, *flags), "-o", str(target)], check=True, timeout=patience(300))
    return target


class FakeCuda:
    """The library at `path`: `cu` is the driver's own face, with the context of device 0 current in this thread."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.cu = ctypes.CDLL(self.path)
        self.cu.fake_count.restype = self.cu.fake_live.restype = ctypes.c_int64
        self.is_strict = hasattr(self.cu, "fake_violations")  # it tells of what is not promised
        self.is_proxy = path.stem == "libproxy_cuda"
        if self.is_strict:
            self.cu.fake_violations.restype = ctypes.c_char_p
        self._calls: list[Any] = []
        self.lost: dict[int, int] = {}  # by device: bytes that tests before have left to it when it hung, as if others had them
        self.excused: list[str] = []  # what is in the text of violations that a test makes on purpose
        self._owned: dict[int, StorageWeakRef] = {}
        self._told: set[int] = set()  # where allocations begin that a test has told of
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._streams: list[tuple[int, int]] = []
        self.before: dict[str, int] = {}
        self.call("cuInit", 0)
        self.configure()

    def configure(self, devices: int = 2, seed: int = 0, most_delay_s: float = 0.0) -> None:
        self.cu.fake_configure(devices, ctypes.c_uint64(seed), ctypes.c_double(most_delay_s))

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.cu, name)(*arguments)
        assert code == 0, f"{name} failed with {code}"

    def make_current(self, device: int = 0) -> None:
        if device not in self._contexts:
            self._contexts[device] = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._contexts[device]), device)
        self.call("cuCtxSetCurrent", self._contexts[device])

    def stream(self, device: int = 0) -> int:
        """A compute stream."""
        handle = ctypes.c_void_p()
        self.make_current(device)
        self.call("cuStreamCreateWithPriority", ctypes.byref(handle), 0, -1)
        self.make_current(0)
        assert handle.value
        self._streams.append((device, handle.value))
        return handle.value

    @contextlib.contextmanager
    def green_context(self, device: int = 0) -> Iterator[None]:
        """Current in this thread, instead of the primary one."""
        self.cu.fake_green_context.restype = ctypes.c_void_p
        self.call("cuCtxSetCurrent", ctypes.c_void_p(self.cu.fake_green_context(device)))
        yield
        self.make_current(0)

    def stream_in_current_context(self, device: int = 0) -> int:
        handle = ctypes.c_void_p()
        self.call("cuStreamCreateWithPriority", ctypes.byref(handle), 0, -1)
        assert handle.value
        self._streams.append((device, handle.value))
        return handle.value

    def end_streams(self) -> None:
        for device, handle in self._streams:
            self.synchronize(device, handle)
            self.make_current(device)
            self.call("cuStreamDestroy_v2", ctypes.c_void_p(handle))
        self._streams.clear()
        self.make_current(0)

    def fill(self, device: int, stream: int, address: int, value: int, length: int, *, told: bool = True) -> None:
        """Work of the training, that writes when its turn comes. `told`: the calling thread is, by locks that no driver
        sees, of all that other threads have seen to end."""
        if told:
            self.learn()
        self.cu.fake_fill(device, ctypes.c_void_p(stream), ctypes.c_void_p(address), value, ctypes.c_size_t(length))

    def call_on_stream(self, device: int, stream: int, call: Callable[[Any], None]) -> None:
        """On the host, when the stream comes to it."""
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(call)
        self._calls.append(function)
        self.make_current(device)
        self.call("cuLaunchHostFunc", ctypes.c_void_p(stream), function, None)
        self.make_current(0)

    def own(self, device: int, storage: torch.UntypedStorage) -> None:
        """From now on it is an allocation of the device, which ends where it ends."""
        address, size = storage.data_ptr(), storage.nbytes()
        known = self._owned.get(address)
        if not self.is_strict or device < 0 or not size or (known is not None and not known.expired()):
            return
        if any(address <= begin < address + size for begin in self._told):
            return
        self._owned[address] = StorageWeakRef(storage)
        self.cu.fake_declare(device, ctypes.c_void_p(address), ctypes.c_size_t(size))

    def learn(self) -> None:
        """A wait that the driver does not see has told this thread that what had been enqueued has ended."""
        if self.is_strict:
            self.cu.fake_learn()

    def violations(self) -> list[str]:
        """What the strict driver has found since the last call."""
        return self.cu.fake_violations().decode().splitlines() if self.is_strict else []

    def assert_no_violation(self) -> None:
        found = [each for each in self.violations() if not any(excuse in each for excuse in self.excused)]
        assert not found, "\n".join(found)

    def forget(self) -> None:
        """What has been done to memory that is given out anew."""
        if self.is_strict:
            self._owned.clear()
            self.cu.fake_forget()

    def synchronize(self, device: int = 0, stream: int = DEFAULT_STREAM) -> None:
        self.cu.fake_synchronize(device, ctypes.c_void_p(stream))

    def fail(self, call: str, *, skip: int = 0, code: int = ILLEGAL_ADDRESS, late: bool = False) -> None:
        if late and self.is_strict and not self.is_proxy:
            pytest.skip("an operation that fails ends its context: nothing that is tested here goes on")
        self.cu.fake_fail(call.encode(), ctypes.c_int64(skip), code, int(late))

    def delay(self, call: str, seconds: float) -> None:
        """Each call of it takes so long."""
        self.cu.fake_delay(call.encode(), ctypes.c_double(seconds))

    def hold_copies(self, hold: bool, *, only_from_allocated: bool = False) -> None:
        """All that have not begun, or only those out of memory that cuMemAlloc has given out."""
        self.cu.fake_hold_copies(2 if hold and only_from_allocated else int(hold))

    def set_order(self, order: str) -> None:
        """What streams do with each other: "right"; "without waits": none waits for an event; "one queue": all work of all
        streams is done in the order in which it was enqueued, as with CUDA_DEVICE_MAX_CONNECTIONS=1.
        """
        self.cu.fake_set_order(("right", "without waits", "one queue").index(order))

    def set_memory(self, *, total: int, others: int = 0) -> None:
        """Of each device, bytes; `others` have taken that much."""
        for device in (0, 1):
            rest = max(0, others - self.lost.get(device, 0))
            self.cu.fake_set_memory(device, ctypes.c_uint64(total), ctypes.c_uint64(rest))

    def allocated_bytes(self, device: int) -> int:
        """By cuMemAlloc, and not given back."""
        self.cu.fake_set_memory(device, ctypes.c_uint64(1 << 40), ctypes.c_uint64(0))
        self.make_current(device)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        self.make_current(0)
        self.configure()
        return total.value - free.value

    def allocated(self, address: int, length: int) -> None:
        """Memory of the training is one allocation of a device from now on, over whose ends no copy goes; 0 bytes: no more."""
        if not self.is_strict or self.is_proxy:
            self.cu.fake_allocated(ctypes.c_void_p(address), ctypes.c_uint64(length))
        if not self.is_strict:
            return
        if length:
            self._told.add(address)
            self.cu.fake_declare(0, ctypes.c_void_p(address), ctypes.c_size_t(length))
        else:
            self._told.discard(address)

    def limit_pinning(self, *, at_once: int = UNLIMITED, altogether: int = UNLIMITED) -> None:
        """Host memory, bytes: more is refused."""
        self.cu.fake_limit_pinning(ctypes.c_uint64(at_once), ctypes.c_uint64(altogether))

    def set_capturing(self, device: int, stream: int, capturing: bool) -> None:
        self.cu.fake_set_capturing(device, ctypes.c_void_p(stream), int(capturing))

    def capture_globally(self, begins: bool) -> None:
        """Somebody else in the process: calls that may disturb him fail, but in threads that have exchanged their mode."""
        self.cu.fake_capture_globally(int(begins))

    def exchange_capture_mode(self, mode: int) -> int:
        """Of the calling thread; returns the one before."""
        exchanged = ctypes.c_int(mode)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(exchanged))
        return exchanged.value

    def is_capturing(self, stream: int) -> bool:
        """A stream of the device whose context is current."""
        return bool(self.cu.fake_is_capturing(ctypes.c_void_p(stream)))

    def count(self, what: str) -> int:
        return int(self.cu.fake_count(what.encode()))

    def alive(self) -> dict[str, int]:
        """What the driver has handed out and not got back, but for what the tests themselves hold."""
        own = {"contexts": len(self._contexts), "streams": len(self._streams)}
        return {what: int(self.cu.fake_live(what.encode())) - own.get(what, 0) for what in ALIVE}


both_drivers = pytest.mark.parametrize("fake_library", list(SOURCES), indirect=True)


@pytest.fixture(scope="session")
def fake_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = getattr(request, "param", CHOSEN)
    directory = tmp_path_factory.getbasetemp() / f"{kind}_cuda"
    if not directory.exists():
        directory.mkdir()
        library = build(directory, kind="random" if kind == "proxy" else kind)
        if kind == "proxy":
            build_proxy(directory, library)
    return next(directory.glob("libproxy_cuda.so"), directory / f"lib{SOURCES.get(kind, PROXY).stem}.so")


@contextlib.contextmanager
def loaded(library: Path) -> Iterator[FakeCuda]:
    """Two devices, no delays, no faults; afterwards nothing of the driver may be left, and no rule broken."""
    fake = FakeCuda(library)
    fake.violations()
    fake.forget()
    fake.make_current(0)
    fake.lost = {device: fake.allocated_bytes(device) for device in (0, 1)}
    fake.before = fake.alive()
    yield fake
    fake.configure()
    fake.end_streams()
    fake.assert_no_violation()
    assert fake.alive() == fake.before


@pytest.fixture
def cuda(fake_library: Path) -> Iterator[FakeCuda]:
    with loaded(fake_library) as fake:
        yield fake
