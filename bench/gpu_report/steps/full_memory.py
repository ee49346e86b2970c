"""Training that fills the device to its limit, in and out: the same without saves, with saves, and with a cache on the device.

Saves may bring no out-of-memory error that the training alone does not have, and memory must stay flat.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import ckpt
from bench.gpu.device import Device, find_device
from bench.gpu.training import BYTES_PER_PARAMETER, GpuTrainer
from bench.gpu_report.findings import FAIL, INCONCLUSIVE, PASS, Findings, step_parser
from bench.measure.sampling import GIB, MIB, clock

WAYS = {"alone": "training alone", "saves": "with saves", "cache": "with saves and Options.device_cache"}
SECONDS = 25.0  # of each way
MOST_PARAMETERS, STAND_IN_PARAMETERS = 100_000_000, 300_000
LEFT_BYTES = 256 * MIB  # of the device, when it is filled: less would be a matter of the driver's own small needs
PIECES, ALIGNED = 64, 2 * MIB  # in which the device is filled; torch takes large blocks in multiples of the latter
SLOWLY = 0.3  # of them come with a pause, as a training grows: within seconds, not at once
PAUSE_S = 0.05
ARENA = "512MiB"  # less than the state, so that a fence that comes early has a use for a cache
CACHE_SHARE = 8  # of the device's memory
STAND_IN_BYTES, STAND_IN_TOTAL = 128 * MIB, GIB // 2
QUIET, MOST_QUIET = 6, 60  # iterations at first that do not fill it: fences come early, and find a cache; then it must go
STILL_BYTES = MIB
FLAT_DEVICE_BYTES, FLAT_HOST_BYTES = 64 * MIB, 128 * MIB
FEWEST = 6  # iterations, below which nothing is said about growth
CHILD_SLACK_S = 60.0


class Ballast:
    """What the training needs beside its state for a moment: blocks of the device, each written to.

    Attributes:
        nbytes: of all of them.
        failures: allocations that failed for want of memory.
    """

    def __init__(self, device: Device, nbytes: int | None) -> None:
        self.failures = 0
        self._device = device
        room = self._room() if nbytes is None else nbytes
        self._piece = room // PIECES // ALIGNED * ALIGNED
        self.nbytes = PIECES * self._piece

    def _room(self) -> int:
        """All that is free, but a little."""
        if self._device.stand_in:
            return STAND_IN_BYTES
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device.torch_device)
        return max(0, free - LEFT_BYTES)

    def in_and_out(self) -> None:
        blocks = []
        try:
            for number in range(PIECES):
                if number >= (1 - SLOWLY) * PIECES and not self._device.stand_in:
                    time.sleep(PAUSE_S)
                blocks.append(torch.empty(self._piece, dtype=torch.uint8, device=self._device.torch_device))
                blocks[-1].fill_(number)
        except torch.OutOfMemoryError:
            self.failures += 1
        self._device.synchronize()


class Memory:
    """What is taken, after each iteration that gives all back that it has no use for.

    Attributes:
        settled: the arena has been touched: the host's does not grow any more, as it does for a while when saves begin.
        device_bytes, host_bytes: since then.
    """

    def __init__(self, device: Device) -> None:
        self.settled = False
        self.device_bytes: list[int] = []
        self.host_bytes: list[int] = []
        self._device, self._process = device, psutil.Process()
        self._before, self._looks = 0, 0

    def look(self) -> None:
        if not self._device.stand_in:
            torch.cuda.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        host = self._process.memory_info().rss
        if self.settled:
            self.device_bytes.append(self._device.taken_bytes())
            self.host_bytes.append(host)
        self._looks += 1
        still = host <= self._before + STILL_BYTES
        self.settled = self.settled or (self._looks >= QUIET and still) or self._looks >= MOST_QUIET
        self._before = host


def child(device: Device, way: str, seconds: float, nbytes: int | None, directory: Path) -> dict[str, Any]:
    """Trains for so long, once memory has settled; what was seen."""
    cache = (STAND_IN_TOTAL if device.stand_in else torch.cuda.mem_get_info(device.torch_device)[1]) // CACHE_SHARE
    options = ckpt.Options(device_lazy=True, arena_bytes=ARENA, device_cache=cache if way == "cache" else 0)
    trainer = GpuTrainer(parameters_for(device, directory), device)
    ballast, memory = Ballast(device, nbytes), Memory(device)
    cached_bytes, pending = [], None
    ends, number = math.inf, 0
    while clock() < ends:
        if way != "alone":
            if pending is not None:
                pending.result(seconds + CHILD_SLACK_S)
                cached_bytes.append(pending.stats.device_cached_bytes)
            pending = ckpt.save(trainer.state(), directory / f"{number % 2}.pt", lazy=trainer.model, options=options)
        trainer.forward_backward()
        if memory.settled:
            ends = min(ends, clock() + seconds)
            ballast.in_and_out()
        trainer.step()
        device.synchronize()
        if not memory.settled or number % 2:
            memory.look()
        number += 1
    if pending is not None:
        pending.result(seconds + CHILD_SLACK_S)
    seen: dict[str, Any] = {"iterations": number, "out_of_memory": ballast.failures, "ballast_bytes": ballast.nbytes}
    seen |= {"device_growth_bytes": growth(memory.device_bytes), "host_growth_bytes": growth(memory.host_bytes)}
    largest = max(memory.device_bytes, default=0)
    return seen | {"largest_device_bytes": largest, "device_cached_bytes": sum(cached_bytes)}


def parameters_for(device: Device, directory: Path) -> int:
    if device.stand_in:
        return STAND_IN_PARAMETERS
    free, _ = torch.cuda.mem_get_info(device.torch_device)
    room = min(free // 3, shutil.disk_usage(directory).free // 4)
    return min(MOST_PARAMETERS, room // (BYTES_PER_PARAMETER + 8))


def growth(values: Sequence[int]) -> int | None:
    """From the second quarter to the last; None: too few for that."""
    if len(values) < FEWEST // 2:
        return None
    quarter = max(1, len(values) // 4)
    return int(statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter]))


def judge(way: str, seen: dict[str, Any], alone: dict[str, Any]) -> tuple[str, str]:
    """The verdict on a way that saves, and the reason."""
    if seen["out_of_memory"] > alone["out_of_memory"]:
        return FAIL, f"{seen['out_of_memory']} allocations failed for want of memory, {alone['out_of_memory']} without saves"
    grown = []
    for place, flat in (("device", FLAT_DEVICE_BYTES), ("host", FLAT_HOST_BYTES)):
        if (seen[f"{place}_growth_bytes"] or 0) > flat + max(0, alone[f"{place}_growth_bytes"] or 0):
            grown.append(f"memory of the {place} grew by {seen[f'{place}_growth_bytes'] / MIB:.0f} MiB")
    if grown:
        return FAIL, "; ".join(grown)
    if seen["device_growth_bytes"] is None:
        return INCONCLUSIVE, f"only {seen['iterations']} iterations: too few to see whether memory grows"
    if alone["out_of_memory"]:
        return INCONCLUSIVE, "the training alone ran out of memory, too"
    return PASS, ""


def run_child(command: list[str], way: str, seconds: float, nbytes: int | None, directory: Path) -> dict[str, Any]:
    """
    Raises:
        RuntimeError: it failed.
    """
    place = directory / way
    place.mkdir()
    more = ["--way", way, "--seconds", str(seconds), *([] if nbytes is None else ["--ballast", str(nbytes)])]
    done = subprocess.run([*command, *more, "--directory", str(place)], stdout=subprocess.PIPE, text=True)
    shutil.rmtree(place)
    if done.returncode != 0:
        raise RuntimeError(f"{WAYS[way]}: the process ended with exit status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str]) -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each way")
    parser.add_argument("--way", choices=WAYS, help="be one of them")
    parser.add_argument("--ballast", type=int, help="bytes of the device to fill; default: all that is free, but a little")
    asked = parser.parse_args(arguments)
    if asked.way:
        print(json.dumps(child(find_device(asked.pretend_cuda), asked.way, asked.seconds, asked.ballast, asked.directory)))
        return
    findings = Findings(asked.out)
    command = [sys.executable, "-m", "bench.gpu_report.steps.full_memory", *arguments]
    with findings.guard(WAYS["alone"]):
        alone = run_child(command, "alone", asked.seconds, asked.ballast, asked.directory)
        findings.add(WAYS["alone"], PASS, **alone)
        for way in ("saves", "cache"):
            with findings.guard(WAYS[way]):
                seen = run_child(command, way, asked.seconds, alone["ballast_bytes"], asked.directory)
                verdict, reason = judge(way, seen, alone)
                findings.add(WAYS[way], verdict, reason, **seen)


if __name__ == "__main__":
    main(sys.argv[1:])
