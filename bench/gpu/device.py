"""The device of the GPU benchmark, and all that the benchmark asks of it: one small face, with a GPU behind it or a stand-in.

The stand-in lets the whole workload run where there is no GPU: host memory plays the device's, and a library with the symbols
of the CUDA driver carries the copies. It shows that the program works, and nothing about speed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from bench.measure.machine import output_of
from bench.measure.sampling import clock
from ckpt import devices as torch_devices

SAMPLE_EVERY_S = 0.01
ASKED_OF_SMI = "driver_version,pcie.link.gen.current,pcie.link.width.current,clocks.max.memory,power.limit"


class Device(Protocol):
    """Attributes:
    torch_device: where the job's tensors lie.
    map_location: what ckpt.load() is told to load to there.
    name: for the reader.
    stand_in: nothing measured on it means anything.
    """

    torch_device: torch.device
    map_location: Any
    name: str
    stand_in: bool

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""

    def keep_order(self) -> None:
        """To be called where a kernel would be launched behind a fence: a processor does not wait for streams by itself."""

    def mark(self) -> Any:
        """A point in the work of the device."""

    def seconds_between(self, begin: Any, end: Any) -> float:
        """Between two points that have been passed, by the device's own clock."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device can write to by itself."""

    def taken_bytes(self) -> int:
        """How much of the device's memory is taken, by whomever."""

    def describe(self) -> dict[str, Any]: ...


class Gpu:
    stand_in = False

    def __init__(self) -> None:
        """
        Raises:
            RuntimeError: there is no GPU here, or no torch that could use it.
        """
        if torch.version.cuda is None or not torch.cuda.is_available():
            raise RuntimeError(
                f"this workload needs an NVIDIA GPU and a torch built for CUDA; torch {torch.__version__} sees none here"
            )
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.map_location = self.torch_device
        self.name = torch.cuda.get_device_name(self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def keep_order(self) -> None:
        pass

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def taken_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total - free

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.torch_device)
        found: dict[str, Any] = {"name": self.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        if shutil.which("nvidia-smi"):
            said = output_of(
                ["nvidia-smi", f"--query-gpu={ASKED_OF_SMI}", "--format=csv,noheader", "-i", str(self._smi_index())]
            )
            found["nvidia_smi"] = dict(zip(ASKED_OF_SMI.split(","), said.split(", "), strict=False))
        return found

    def _smi_index(self) -> Any:
        """What nvidia-smi calls it: it does not know CUDA_VISIBLE_DEVICES."""
        uuid = getattr(torch.cuda.get_device_properties(self.torch_device), "uuid", None)
        return self.torch_device.index if uuid is None else f"GPU-{uuid}"


@dataclasses.dataclass
class InHostMemory:
    """The one device, as the library is to see it, where host memory plays its memory. See ckpt.devices.Devices."""

    driver: str | None
    in_host_memory: bool = True

    def are_possible(self) -> bool:
        return True

    def at_work(self) -> list[int]:
        return []

    def index_of(self, storage: torch.UntypedStorage) -> int:
        return 0

    def index_named(self, location: str) -> int:
        return int(location.partition(":")[2] or 0)

    def stream_of(self, device: int) -> int:
        return 0

    def is_capturing(self) -> bool:
        return False

    def allocate(self, nbytes: int, device: int) -> torch.UntypedStorage:
        return torch.UntypedStorage(nbytes)


class StandIn:
    """
    Args:
        library: a stand-in for the CUDA driver, as tests/fake_cuda makes it.
    """

    stand_in = True

    def __init__(self, library: Path) -> None:
        self.torch_device = torch.device("cpu")
        self.map_location = "cuda:0"
        self.name = "no GPU: host memory and a fake driver stand in for it"
        self._library = ctypes.CDLL(str(library))
        self._library.fake_configure(1, ctypes.c_uint64(0), ctypes.c_double(0.0))
        torch_devices.in_use = InHostMemory(str(library))

    def synchronize(self) -> None:
        self._library.fake_synchronize(0, ctypes.c_void_p(None))

    def keep_order(self) -> None:
        self.synchronize()

    def mark(self) -> float:
        self.synchronize()
        return clock()

    def seconds_between(self, begin: float, end: float) -> float:
        return end - begin

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def taken_bytes(self) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "stand_in": True}


def find_device(pretended_cuda: Path | None) -> Device:
    return Gpu() if pretended_cuda is None else StandIn(pretended_cuda)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Looks every 10 ms how much memory is taken, on the host and on the device, over what was taken when it was made.

    On the host: the resident set of this process, pinned and shared memory included, and the anonymous memory of its children;
    not the page cache.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(daemon=True)
        self._device, self._process = device, psutil.Process()
        self._stop_asked = threading.Event()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else a save could grow into free heap unseen
        self._host_before, self._device_before = self._host(), device.taken_bytes()
        self.host_bytes = self.device_bytes = 0

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        while not self._stop_asked.wait(SAMPLE_EVERY_S):
            self.host_bytes = max(self.host_bytes, self._host() - self._host_before)
            self.device_bytes = max(self.device_bytes, self._device.taken_bytes() - self._device_before)

    def _host(self) -> int:
        taken = int(self._process.memory_info().rss)
        for child in self._process.children(recursive=True):
            try:
                found = child.memory_info()
            except psutil.Error:  # it has just ended
                continue
            taken += found.rss - found.shared
        return taken
