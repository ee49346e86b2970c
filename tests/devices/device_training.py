"""Training on devices, on machines that have none: host memory plays theirs, and a fake driver carries it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import support
import torch
from fake_driver import FakeCuda, cuda, fake_library
from support import close_engines

import ckpt
from ckpt import device_modes
from ckpt import devices as torch_devices

__all__ = ["cuda", "fake_library"]


def options(**how: Any) -> ckpt.Options:
    return support.options(device_lazy=True, **how)


class Training:
    """Two devices, each with the stream on which it computes.

    Attributes:
        on: the device of a storage, or HOST.
        given: to loads, and of which device.
    """

    in_host_memory = True

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.driver: str | None = cuda.path
        self.streams = {device: cuda.stream(device) for device in (0, 1)}
        self.on: Callable[[Any], int] = lambda storage: 0
        self.given: list[tuple[torch.UntypedStorage, int]] = []

    def are_possible(self) -> bool:
        return True

    def at_work(self) -> list[int]:
        return []

    def index_of(self, storage: torch.UntypedStorage) -> int:
        device = self.on(storage)
        self.cuda.own(device, storage)
        return device

    def index_named(self, location: str) -> int:
        return int(location.partition(":")[2] or 0)

    def stream_of(self, device: int) -> int:
        return self.streams[device]

    def is_capturing(self) -> bool:
        """Device 0 is current."""
        return self.cuda.is_capturing(self.streams[0])

    def fill(self, tensor: torch.Tensor, value: int, device: int = 0) -> None:
        """What a kernel would do, in its turn."""
        self.cuda.own(device, tensor.untyped_storage())
        self.cuda.fill(device, self.streams[device], tensor.data_ptr(), value, tensor.nbytes)

    def allocate(self, nbytes: int, device: int) -> torch.UntypedStorage:
        """What torch would give a load; kernels of before may still be writing to it."""
        storage = torch.UntypedStorage(nbytes)
        self.cuda.own(device, storage)
        if nbytes:
            self.cuda.fill(device, self.streams[device], storage.data_ptr(), 0xDD, nbytes)
        self.given.append((storage, device))
        return storage

    def placed(self, tensor: torch.Tensor) -> int | None:
        """The device on which a load has put it; None: the host."""
        address = tensor.untyped_storage().data_ptr()
        return next((device for storage, device in self.given if storage.data_ptr() == address), None)

    def platform_of(self, device: int) -> tuple[str, int]:
        return "9.0", 12

    def synchronize_stream(self, device: int) -> None:
        self.cuda.synchronize(device, self.streams[device])

    def start_sums(self, spans: Sequence[torch_devices.Span], device: int) -> Callable[[float], list[int] | None]:
        """What its kernels would find, when its stream comes to them."""
        found: list[int] = []
        done = threading.Event()

        def look(_: Any) -> None:
            found.extend(int(torch_devices.word_sum(*span)) for span in spans)
            done.set()

        self.cuda.call_on_stream(device, self.streams[device], look)
        return lambda patience_s: found if done.wait(patience_s) else None

    def synchronize(self) -> None:
        for device, stream in self.streams.items():
            self.cuda.synchronize(device, stream)


@pytest.fixture
def training(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, native: Any) -> Iterator[Training]:
    close_engines()
    training = Training(cuda)
    monkeypatch.setattr(torch_devices, "in_use", training)
    monkeypatch.setattr(device_modes, "_standings", {})
    yield training
    cuda.hold_copies(False)
    training.synchronize()
    close_engines()


def state(value: float = 1.0, count: int = 6) -> dict[str, Any]:
    tensors = {f"layer {number}": torch.full((50_000 + number,), value) for number in range(count)}
    return tensors | {"small": torch.full((7,), value), "note": f"of {value}"}
