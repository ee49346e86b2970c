"""How large the benchmarks may be on this machine: memory, disk and time set the scale, which is 1 where all suffice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.gpu.setup import PARAMETERS
from bench.gpu.training import BYTES_PER_PARAMETER

STATE_BYTES = PARAMETERS * BYTES_PER_PARAMETER
SCALES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.002)
MOST_ROUNDS = 5
# How many times the state each thing needs to have free: the job with its gradients and activations; arenas, staging memory and
# the copies that rivals keep; files of several ways of saving, beside each other.
DEVICE_TIMES, HOST_TIMES, DISK_TIMES = 4.0, 7.5, 3.5
HOST_BASE_BYTES = 4 << 30
DEVICE_BASE_BYTES = 4 << 30  # contexts and activations
START_S = 15.0  # of each part: CUDA, the model, warming up
OTHERS, OTHERS_TIMES, OTHERS_GBPS = 7, 1.6, 1.2  # torch.save, five ways of DCP, DataStates; as seen on CPUs
UNKNOWN_GBPS = 0.5  # of the disk
SHARE = 0.85  # of the time that is left; what is expected is a guess


@dataclasses.dataclass(frozen=True)
class Size:
    """
    Attributes:
        seconds: that each part is expected to take.
        why: what kept the scale below 1; empty if nothing did.
    """

    scale: float
    rounds: int
    seconds: Mapping[str, float]
    why: str = ""


def expected_s(scale: float, rounds: int, disk_GBps: float) -> dict[str, float]:
    """By part. What ours does takes as long as the disk does; what others do takes longer, however fast the disk is."""
    state = scale * STATE_BYTES / 1e9
    ours = state / disk_GBps
    other = max(OTHERS_TIMES * ours, state / OTHERS_GBPS)
    seconds = {
        "rate": 2 * (1 + rounds) * ours,
        "blocked": (1 + rounds) * (2 * ours + OTHERS * other) + 3 * ours,
        "iterations": (1.25 * 4 * 3 * rounds + 4) * ours,
        "restore": ours + 2 * other + (1 + rounds) * (2 * ours + 3 * other),
    }
    return {part: START_S + each for part, each in seconds.items()}


def choose(facts: Mapping[str, Any], left_s: float) -> Size:
    """The largest scale that everything has room for, then the most rounds that time has room for."""
    why = "no scale is small enough"
    disk = float(facts.get("disk_write_GBps") or UNKNOWN_GBPS)
    for scale in SCALES:
        if lacking := lacks(facts, scale * STATE_BYTES):
            why = lacking
            continue
        for rounds in range(MOST_ROUNDS, 0, -1):
            seconds = expected_s(scale, rounds, disk)
            if sum(seconds.values()) <= SHARE * left_s:
                return Size(scale, rounds, seconds, "" if scale == 1 else why)
        why = f"the disk writes {disk:.2g} GB/s, and {left_s:.0f} s are left"
    return Size(SCALES[-1], 1, expected_s(SCALES[-1], 1, disk), why)


def lacks(facts: Mapping[str, Any], state: float) -> str:
    """What a state of so many bytes has no room for, or may have none because nothing is known of it."""
    available, group = facts.get("memory_available_bytes"), facts.get("cgroup_memory_bytes")
    host = min(available, group) if available and group else available
    needs = {
        "memory of the GPU": (facts.get("gpu_free_bytes"), DEVICE_TIMES * state + DEVICE_BASE_BYTES),
        "memory of the host": (host, HOST_TIMES * state + HOST_BASE_BYTES),
        "room on the disk": (facts.get("disk_free_bytes"), DISK_TIMES * state),
    }
    for name, (there, needed) in needs.items():
        if there is None:
            return f"it is not known how much {name} there is"
        if there < needed:
            return f"{needed / 1e9:.0f} GB of {name} are needed at the next larger scale, and {there / 1e9:.0f} GB are there"
    return ""
