"""A CUDA graph is captured in another thread, in the mode "global", while a save is in flight: neither may break the other."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ckpt
from bench.gpu.device import Device, find_device
from bench.gpu.setup import check_file
from bench.gpu_report.findings import INCONCLUSIVE, PASS, Findings, step_parser
from ckpt.saving import inspection

CHECK = "a capture in another thread while a save is in flight"
ROUNDS = 3
BYTES, TENSORS = 1 << 30, 32
STAND_IN_BYTES = 64 << 20
ARENA = "16MiB"  # much less than the state, so that copies go on for a while
PRETENDED_S = 0.002
TIMEOUT_S = 120.0


def main(arguments: list[str]) -> None:
    asked = step_parser(__doc__).parse_args(arguments)
    findings = Findings(asked.out)
    device = find_device(asked.pretend_cuda)
    capture = pretended_capture(asked.pretend_cuda) if asked.pretend_cuda else Capture(device).once
    with findings.guard(CHECK):
        tensors = make_tensors(device)
        during = [save_during_captures(tensors, asked.directory / f"{n}.pt", device, capture) for n in range(ROUNDS)]
        reason = "" if sum(during) else "every save had left the device before a capture began"
        findings.add(CHECK, PASS if sum(during) else INCONCLUSIVE, reason, captures_during_copies=sum(during))


def make_tensors(device: Device) -> list[torch.Tensor]:
    count = (STAND_IN_BYTES if device.stand_in else BYTES) // TENSORS // 4
    return [torch.full((count,), float(number), device=device.torch_device) for number in range(TENSORS)]


def save_during_captures(tensors: list[torch.Tensor], path: Path, device: Device, capture: Callable[[], None]) -> int:
    """Captures begun and ended while copies went on.

    Raises:
        AssertionError, Exception: the save or a capture has failed.
    """
    device.synchronize()
    expected = [tensor.cpu().clone() for tensor in tensors]
    options = ckpt.Options(device_lazy=True, arena_bytes=ARENA)
    pending = ckpt.save(tensors, path, lazy=True, options=options)
    job = inspection.files_of(pending)[0].job
    during, errors = 0, []

    def work() -> None:
        nonlocal during
        try:
            while True:  # at least once
                capture()
                if job.wait_released(0.0):
                    break
                during += 1
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    pending.result(TIMEOUT_S)
    check_file(path, expected, device)
    path.unlink()
    return during


class Capture:
    """A small graph, captured on a stream of its own and replayed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream()
        self._there, self._here = (torch.zeros(1024, device=device.torch_device) for _ in range(2))
        self._count = 0

    def once(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self._count += 1
        with torch.cuda.stream(self._stream):
            self._there.fill_(float(self._count))
            self._stream.synchronize()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="global"):
                self._here.copy_(self._there)
            graph.replay()
            self._stream.synchronize()
            assert bool((self._here == self._count).all()), "the replayed graph has not done what was captured"


def pretended_capture(path: Path) -> Callable[[], None]:
    """A driver that only tells who would break a capture."""
    library = ctypes.CDLL(str(path))
    library.fake_count.restype = ctypes.c_int64

    def once() -> None:
        library.fake_capture_globally(1)
        time.sleep(PRETENDED_S)  # in which other threads make their calls
        library.fake_capture_globally(0)
        assert library.fake_count(b"captures broken") == 0, "a call of another thread has broken the capture"

    return once


if __name__ == "__main__":
    main(sys.argv[1:])
