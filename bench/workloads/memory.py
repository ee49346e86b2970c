"""How much resident memory a save needs on top of the state."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ckpt
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, MIB, Settings, Side, Values, interleave

ALLOWANCE = 64 * MIB  # beyond the arena
TIMEOUT_S = 600

CASES = {
    "ckpt": "ckpt.save() of lazy tensors, waited for until durable",
    "ckpt, fenced at once": "the same, with a fence right after save(): what has not left goes through the arena",
    "ckpt, copied in save()": "ckpt.save() of tensors that are not lazy: everything goes through the arena",
    "torch.save + fsync": "torch.save to a file, flush, fsync",
}
HOW = (
    "in a process of its own: the peak of the resident set (the kernel's high-water mark VmHWM, reset when the state stood but "
    "the engine did not, or a sample if one was above it), minus the resident set then; two saves, until both are durable"
)


def measure_memory(settings: Settings, report: Report) -> None:
    arena = ckpt.Options().size("arena_bytes")
    nbytes = settings.sized(2 * GIB)
    with settings.workspace() as directory:
        sides = [Side(case, partial(run_child, case, nbytes, directory)) for case in CASES]
        samples = interleave(sides, settings.rounds_or(2), settings.settle, warmup=0)
    for case, column in samples.items():
        bar = Bar("<=", (arena + ALLOWANCE) / MIB) if case.startswith("ckpt") else None
        detail: dict[str, Any] = {"saved_as": CASES[case], "arena_bytes": arena}
        for name, value in (("marked_by_the_kernel_MiB", "marked_peak_MiB"), ("sampled_every_5_ms_MiB", "sampled_peak_MiB")):
            detail[name] = [sample.values[value] for sample in column]
        report.add("memory", case, "MiB", column, nbytes=nbytes, how=HOW, bar=bar, **detail)


def run_child(case: str, nbytes: int, directory: Path) -> Values:
    command = [sys.executable, "-m", "bench.workloads.memory_process", case, str(nbytes), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"the measured process failed: {done.stderr}")
    return dict(json.loads(done.stdout))
