"""CUDA devices: what lies on which, and the streams on which they compute just now. Those of torch, or a stand-in."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch.storage import UntypedStorage

from ckpt import fence_hooks

HOST = -1
Span = tuple[UntypedStorage, int, int]  # its bytes [second, second + third)
_WORD = 8  # bytes
_LOOK_S = 0.002


class Devices(Protocol):
    """The devices of this process.

    Attributes:
        driver: the file of the CUDA driver; None: the system's.
        in_host_memory: host memory plays theirs, where there are none: torch takes for the host's what lies on them.
    """

    driver: str | None
    in_host_memory: bool

    def are_possible(self) -> bool:
        """Whether there may be any. Asks no driver: a process that has asked can fork none that computes on devices."""

    def at_work(self) -> list[int]:
        """The device that this process has begun to use, if any."""

    def index_of(self, storage: UntypedStorage) -> int:
        """The device whose bytes the engine can fetch itself; HOST for all others."""

    def index_named(self, location: str) -> int:
        """The device of a name that begins with "cuda"; HOST for what is none of this process."""

    def stream_of(self, device: int) -> int:
        """The handle of the stream that is current for this thread."""

    def is_capturing(self) -> bool:
        """Whether the current stream of the current device is being captured into a graph. Makes no context."""

    def allocate(self, nbytes: int, device: int) -> UntypedStorage:
        """Memory of the device."""

    def platform_of(self, device: int) -> tuple[str, int]:
        """Its compute capability, as in "9.0", and the major version of the CUDA that torch was built with."""

    def synchronize_stream(self, device: int) -> None:
        """Waits for all that its current stream has been given."""

    def mark(self, device: int) -> Callable[[], None]:
        """What waits, on any thread, for all that its current stream has been given so far."""

    def start_sums(self, spans: Sequence[Span], device: int) -> Callable[[float], list[int] | None]:
        """Enqueues, on the current stream, the sums of the 64-bit little-endian words of each (the last filled up with zeros).

        Returns what gives them, modulo 2^64; None if they have not come within so many seconds.
        """


@dataclasses.dataclass
class TorchDevices:
    """Those that torch computes on."""

    driver: str | None = None
    in_host_memory: bool = False

    def are_possible(self) -> bool:
        return torch.version.cuda is not None

    def at_work(self) -> list[int]:
        return [torch.cuda.current_device()] if self.are_possible() and torch.cuda.is_initialized() else []

    def index_of(self, storage: UntypedStorage) -> int:
        if storage.device.type != "cuda" or torch.version.cuda is None:  # ROCm calls its devices so, too
            return HOST
        return int(storage.device.index or 0)

    def index_named(self, location: str) -> int:
        if not torch.cuda.is_available():
            return HOST
        named = torch.device(location).index
        index = torch.cuda.current_device() if named is None else int(named)
        return index if index < torch.cuda.device_count() else HOST

    def stream_of(self, device: int) -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    def is_capturing(self) -> bool:
        return self.are_possible() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def allocate(self, nbytes: int, device: int) -> UntypedStorage:
        return UntypedStorage(nbytes, device=f"cuda:{device}")

    def platform_of(self, device: int) -> tuple[str, int]:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{major}.{minor}", int(str(torch.version.cuda).partition(".")[0])

    def synchronize_stream(self, device: int) -> None:
        torch.cuda.current_stream(device).synchronize()

    def mark(self, device: int) -> Callable[[], None]:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        return done.synchronize

    def start_sums(self, spans: Sequence[Span], device: int) -> Callable[[float], list[int] | None]:
        with torch.cuda.device(device), torch.no_grad():
            found = torch.stack([word_sum(*span) for span in spans])
            host = torch.empty(len(spans), dtype=torch.int64, device="cpu", pin_memory=True)
            host.copy_(found, non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def poll(patience_s: float) -> list[int] | None:
            deadline = time.monotonic() + patience_s
            while not done.query():
                if time.monotonic() > deadline:
                    return None
                time.sleep(_LOOK_S)
            return [int(value) for value in host.tolist()]

        return poll


def word_sum(storage: UntypedStorage, low: int, nbytes: int) -> torch.Tensor:
    """The sum of the 64-bit little-endian words of bytes [low, low + nbytes), the last filled up with zeros, modulo 2^64.

    A scalar of int64 where the storage is.
    """
    words, rest = divmod(nbytes, _WORD)
    if low % _WORD == 0:
        sums = _view(storage, torch.int64, low // _WORD, words).sum()
    else:  # a column for each byte of a word
        columns = _view(storage, torch.uint8, low, words * _WORD).view(words, _WORD)
        sums = _shifted(columns.sum(0, dtype=torch.int64)).sum()
    return sums + _shifted(_view(storage, torch.uint8, low + words * _WORD, rest).to(torch.int64)).sum()


def _view(storage: UntypedStorage, dtype: torch.dtype, begin: int, count: int) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, begin, (count,), (1,))


def _shifted(values: torch.Tensor) -> torch.Tensor:
    return values << torch.arange(0, 8 * len(values), 8, device=values.device)


in_use: Devices = TorchDevices()  # what all below asks; those who have no devices put others here


def index_of(storage: UntypedStorage) -> int:
    """The device whose bytes the engine can fetch itself; HOST for all others."""
    return in_use.index_of(storage)


def streams_of(devices: Iterable[int]) -> dict[int, int]:
    """For each device the handle of the stream that is current for this thread."""
    return {device: in_use.stream_of(device) for device in devices}


def is_capturing() -> bool:
    """Whether what this thread enqueues just now is recorded into a CUDA graph instead of being done."""
    return in_use.is_capturing()


def at_work() -> list[int]:
    """The device that this process has begun to use, if any: the engine gets ready for it before the first save."""
    return in_use.at_work()


# ---- loading ---------------------------------------------------------------------------------------------------------


def holding(tensor: torch.Tensor) -> int:
    """The device that can be sent bytes for the tensor; HOST for all others."""
    if not in_use.in_host_memory and tensor.device.type != "cuda":
        return HOST
    try:
        return index_of(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):  # it has no memory of its own, or not yet
        return HOST


def are_possible() -> bool:
    """Whether this process may have any. Asks no driver."""
    return in_use.are_possible()


def index_named(location: str) -> int:
    """The device that files and map_location name so, as in "cuda:1"; HOST for what is none of this process.

    Raises:
        whatever torch says of such a name.
    """
    is_device = location.partition(":")[0] == "cuda" and are_possible()
    return in_use.index_named(location) if is_device else HOST


def allocate(nbytes: int, device: int) -> UntypedStorage:
    """Memory of the device, of torch's own allocator.

    Raises:
        Exception: there is not enough, or the device cannot be used.
    """
    return in_use.allocate(nbytes, device)


def strangers(storages: Iterable[UntypedStorage]) -> set[int]:
    """The id() of storages on devices that torch takes for host memory."""
    return set(map(id, storages)) if in_use.in_host_memory else set()


fence_hooks.loaded(__name__)
