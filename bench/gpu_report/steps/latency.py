"""What copies in the background do to the training's own small waits: `loss.item()`, and an all-reduce between two processes.

Each is measured in turn without copies and while a save is leaving the device; what counts is the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import ckpt
from bench.gpu.device import Device, find_device
from bench.gpu_report.findings import INCONCLUSIVE, PASS, Findings, step_parser
from bench.measure.sampling import GIB, MIB, clock
from ckpt.saving import inspection

ITEM, REDUCE = "latency of loss.item()", "latency of an all-reduce"
SECONDS = 30.0
ENOUGH, FEWEST = 1000, 50  # samples; below the latter nothing is said
MOST_BYTES, STAND_IN_BYTES = 4 * GIB, 64 * MIB
REDUCED_BYTES, STAND_IN_REDUCED_BYTES = 25 * MIB, MIB  # DistributedDataParallel's buckets have 25 MiB
ALONE_S = 0.25  # of a round without copies
TIMEOUT_S = 120.0


class Copies:
    """A state that leaves the device again and again."""

    def __init__(self, device: Device, directory: Path, share: int) -> None:
        """
        Args:
            share: processes that do the same on this machine.
        """
        self._path, self._device = directory / f"{os.getpid()}.pt", device
        nbytes = STAND_IN_BYTES
        if not device.stand_in:
            free, _ = torch.cuda.mem_get_info(device.torch_device)
            nbytes = min(MOST_BYTES, free // 4 // share, psutil.virtual_memory().available // 8 // share)
        count = max(1, nbytes // (16 * MIB))
        self._tensors = [torch.ones(4 * MIB, device=device.torch_device) for _ in range(count)]
        self.nbytes = 16 * MIB * count
        self._options = ckpt.Options(device_lazy=True, arena_bytes=self.nbytes + 64 * MIB)
        with self.going_on():  # makes and pins the arena
            pass

    @contextlib.contextmanager
    def going_on(self) -> Iterator[Callable[[], bool]]:
        """Yields what tells whether they still go on; on leaving the file is gone."""
        self._device.synchronize()
        pending = ckpt.save(self._tensors, self._path, lazy=True, options=self._options)
        job = inspection.files_of(pending)[0].job
        yield lambda: not job.wait_released(0.0)
        pending.result(TIMEOUT_S)
        self._path.unlink()


def compare(findings: Findings, check: str, alone: Sequence[float], beside: Sequence[float], **more: Any) -> None:
    """Seconds without copies, and while they went on."""
    figures: dict[str, Any] = {"samples_alone": len(alone), "samples_beside_copies": len(beside)}
    if len(alone) >= 2 and len(beside) >= 2:
        for name, of in (("median", statistics.median), ("p99", p99)):
            figures |= {f"{name}_alone_us": of(alone) * 1e6, f"{name}_beside_copies_us": of(beside) * 1e6}
            figures[f"{name}_ratio"] = of(beside) / of(alone)
    few = len(beside) < FEWEST
    reason = f"only {len(beside)} samples while copies went on, which ended too soon for more" if few else ""
    findings.add(check, INCONCLUSIVE if few else PASS, reason, **figures, **more)


def wait_for_stream(device: Device) -> None:
    """For the training's own work alone, not for copies beside it."""
    if not device.stand_in:
        torch.cuda.current_stream().synchronize()


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(0.99 * len(values)) - 1)]


# ---- loss.item() -----------------------------------------------------------------------------------------------------


def measure_item(findings: Findings, device: Device, copies: Copies, seconds: float) -> None:
    weights = torch.randn(256, 256, device=device.torch_device)

    def sample() -> float:
        loss = (weights @ weights).square().mean()
        wait_for_stream(device)
        began = clock()
        loss.item()
        return clock() - began

    alone: list[float] = []
    beside: list[float] = []
    ends = clock() + seconds
    while clock() < ends and (len(alone) < ENOUGH or len(beside) < ENOUGH):
        until = clock() + ALONE_S
        while clock() < until:
            alone.append(sample())
        with copies.going_on() as still:
            while still():
                beside.append(sample())
    compare(findings, ITEM, alone, beside, copied_bytes=copies.nbytes)


# ---- an all-reduce ---------------------------------------------------------------------------------------------------


def backend_for(device: Device) -> str:
    return "nccl" if not device.stand_in and torch.cuda.device_count() > 1 else "gloo"


def join(rank: int, device: Device, store: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend_for(device), store=dist.FileStore(str(store), 2), rank=rank, world_size=2)


class Rank:
    """One of the two processes, which do the same all the time: the first says when to go on.

    Attributes:
        alone, beside: seconds of each all-reduce, without copies, and begun while they went on.
    """

    def __init__(self, device: Device, copies: Copies, lead: bool) -> None:
        nbytes = STAND_IN_REDUCED_BYTES if device.stand_in else REDUCED_BYTES
        self.alone: list[float] = []
        self.beside: list[float] = []
        self._device, self._copies, self._lead = device, copies, lead
        self._tensor = torch.ones(nbytes // 4, device=device.torch_device)
        self._word = torch.zeros(1, device=device.torch_device)
        self._reduce()  # makes the connections

    def _agree(self, goes_on: bool) -> bool:
        """On what the first process says."""
        self._word.fill_(float(self._lead and goes_on))
        dist.broadcast(self._word, 0)
        return bool(self._word.item())

    def _reduce(self) -> float:
        self._tensor.fill_(1.0)
        wait_for_stream(self._device)
        began = clock()
        dist.all_reduce(self._tensor)
        wait_for_stream(self._device)
        return clock() - began

    def loop(self, seconds: float) -> None:
        ends = clock() + seconds
        while self._agree(clock() < ends and min(len(self.alone), len(self.beside)) < ENOUGH):
            until = clock() + ALONE_S
            while self._agree(clock() < until):
                self.alone.append(self._reduce())
            with self._copies.going_on() as still:
                while self._agree(still()):
                    self.beside.append(self._reduce())


def measure_reduce(findings: Findings, device: Device, copies: Copies, command: list[str], asked: argparse.Namespace) -> None:
    seconds, directory = asked.seconds, asked.directory
    store = directory / "store"
    other = subprocess.Popen([*command, "--second", str(store)])
    try:
        join(0, device, store)
        rank = Rank(device, copies, lead=True)
        rank.loop(seconds)
        compare(findings, REDUCE, rank.alone, rank.beside, backend=backend_for(device), copied_bytes=copies.nbytes)
        dist.destroy_process_group()
        if other.wait(TIMEOUT_S) != 0:
            raise RuntimeError(f"the other process ended with exit status {other.returncode}")
    finally:
        other.kill()
        other.wait()


def main(arguments: list[str]) -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--second", type=Path, metavar="STORE", help="be the other process of the all-reduce")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each of the two, at most")
    asked = parser.parse_args(arguments)
    if asked.second and torch.cuda.device_count() > 1:
        torch.cuda.set_device(1)
    device = find_device(asked.pretend_cuda)
    copies = Copies(device, asked.directory, share=2)
    if asked.second:
        join(1, device, asked.second)
        Rank(device, copies, lead=False).loop(asked.seconds)
        dist.destroy_process_group()
        return
    findings = Findings(asked.out)
    with findings.guard(ITEM):
        measure_item(findings, device, copies, asked.seconds)
    with findings.guard(REDUCE):
        command = [sys.executable, "-m", "bench.gpu_report.steps.latency", *arguments]
        measure_reduce(findings, device, copies, command, asked)


if __name__ == "__main__":
    main(sys.argv[1:])
