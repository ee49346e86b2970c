"""Saves one state twice and prints by how much the process grew. A process of its own for each measurement."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

import ckpt
from bench.rivals.torch_save import torch_save_durable

TENSORS = 64
SAVES = 2
SAMPLE_EVERY_S = 0.005
MIB = 1 << 20


class Watch(threading.Thread):
    """Samples the resident set beside the kernel's own high-water mark.

    Both are lower bounds of the peak: samples miss short peaks, and the kernel updates its mark without a lock, from
    counters that may lag behind.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._stop_asked = threading.Event()
        self.peak = self.now()

    def now(self) -> int:
        return int(self._process.memory_info().rss)

    def run(self) -> None:
        while not self._stop_asked.wait(SAMPLE_EVERY_S):
            self.peak = max(self.peak, self.now())

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def make_state(nbytes: int) -> dict[str, torch.Tensor]:
    elements = max(1, nbytes // TENSORS // 4)
    pattern = torch.randn(elements)
    return {f"tensor{i}": pattern + i for i in range(TENSORS)}


def save(case: str, state: dict[str, torch.Tensor], path: Path) -> None:
    if case.startswith("torch"):
        torch_save_durable(state, path)
    else:
        pending = ckpt.save(state, path, lazy="copied" not in case)
        if "fenced" in case:
            ckpt.fence()
        pending.result()
    path.unlink()


def high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say VmHWM")


def forget_the_past() -> None:
    """Gives free heap back, so that no save can grow into it unseen, and resets the kernel's high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    case, nbytes, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    state = make_state(nbytes)
    watch = Watch()
    watch.start()
    time.sleep(10 * SAMPLE_EVERY_S)  # its own pages are there
    forget_the_past()
    before = watch.peak = watch.now()
    for number in range(SAVES):
        save(case, state, directory / f"{number}.pt")
    marked = high_water_mark()
    watch.stop()
    peaks = {"extra_MiB": max(marked, watch.peak), "marked_peak_MiB": marked, "sampled_peak_MiB": watch.peak}
    print(json.dumps({name: (peak - before) / MIB for name, peak in peaks.items()}))


if __name__ == "__main__":
    main()
