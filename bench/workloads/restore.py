"""How fast a state comes back from a disk whose bytes are not cached, and what memory that takes, beside others and fio."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import fio
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, MIB, Samples, Settings, Side, Values, column, interleave, note

ALLOWANCE = 64 * MIB  # beyond the state
TIMEOUT_S = 1200
FINALISTS = 2
SMALL_BYTES = 1 * MIB  # of what is loaded before the clock starts, so that no import is measured

OURS, INTO = "ckpt.load", "ckpt.load_into"
FOREIGN = "ckpt.load, a file by torch.save"
TORCH, MAPPED, SAFETENSORS, DCP = "torch.load", "torch.load(mmap), touched", "safetensors load_file, touched", "DCP load"
CASES = (OURS, INTO, FOREIGN, TORCH, MAPPED, SAFETENSORS, DCP)
OURS_TENSORS, OURS_TENSORS_INTO = "ckpt.load, safetensors", "ckpt.load_into, safetensors"  # of the workload of that name

HOW = (
    "in a process of its own, which has loaded a small file in the same way before: the file's pages are dropped from the page "
    "cache, then the clock runs around the load; afterwards the bytes are compared with what was saved"
)
HOW_MEMORY = "of the same process: the kernel's high-water mark of the resident set over the load, minus what was there before"
HOW_FIO = "as fio reports it: direct reads of a file of the same size"


def measure_restore(settings: Settings, report: Report) -> None:
    nbytes = settings.sized(2 * GIB)
    with settings.workspace() as directory:
        digests = {"full": write_files(directory / "full", nbytes), "small": write_files(directory / "small", SMALL_BYTES)}
        limits = {}
        if settings.fio_grid:
            limits = best_limits(settings, directory / "limit", nbytes)
        sides = [Side(case, partial(run_child, "load", case, directory, digests)) for case in CASES]
        sides += [Side(name, partial(fio_rate, config, directory / "limit", nbytes)) for name, config in limits.items()]
        samples = interleave(sides, settings.rounds_or(5), settings.settle, warmup=0)
    add_restore(report, samples, list(limits), nbytes)


def write_files(directory: Path, nbytes: int) -> int:
    """The state in all formats, made durable; what its bytes add up to."""
    directory.mkdir()
    said = child("write", "", directory, nbytes)
    return int(said["digest"])


def run_child(action: str, case: str, directory: Path, digests: dict[str, int]) -> Values:
    said = child(action, case, directory)
    for name, digest in digests.items():
        if int(said.pop(f"digest_{name}")) != digest:
            raise AssertionError(f"{case} has brought back something else")
    return {name: float(value) for name, value in said.items()}


def child(action: str, case: str, directory: Path, nbytes: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.workloads.restore_process", action, case, str(directory), str(nbytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"the measured process failed: {done.stderr}")
    return dict(json.loads(done.stdout))


# ---- fio -------------------------------------------------------------------------------------------------------------


def fio_rate(config: fio.Config, path: Path, nbytes: int) -> Values:
    return {"rate_GBps": fio.run_read(config, path, nbytes) / 1e9}


def best_limits(settings: Settings, path: Path, nbytes: int) -> dict[str, fio.Config]:
    """The configurations that read fastest in a short look at each.

    Raises:
        fio.FioError: none works.
    """
    rates: dict[str, float] = {}
    failed: dict[str, str] = {}
    configs = {str(config): config for config in map(fio.Config.parse, settings.fio_grid)}
    for name, config in configs.items():
        note(f"looking for the disk's limit: {name}")
        try:
            rates[name] = fio.run_read(config, path, nbytes)
        except fio.FioError as error:
            failed[name] = str(error)
    if not rates:
        raise fio.FioError(f"nothing can read past the page cache here: {failed}")
    return {name: configs[name] for name in sorted(rates, key=lambda name: -rates[name])[:FINALISTS]}


# ---- results ---------------------------------------------------------------------------------------------------------


def add_restore(report: Report, samples: Samples, limits: list[str], nbytes: int) -> None:
    for name in limits:
        report.add("restore", name, "GB/s", samples[name], nbytes=nbytes, how=HOW_FIO)
    for case in CASES:
        report.add("restore", case, "s", samples[case], nbytes=nbytes, how=HOW)
    for case in CASES:
        bar = {OURS: Bar("<=", (nbytes + ALLOWANCE) / MIB), INTO: Bar("<=", ALLOWANCE / MIB)}.get(case)
        peaks = column(samples[case], "extra_MiB")
        report.add("restore", case, "MiB", peaks, nbytes=nbytes, how=HOW_MEMORY, bar=bar)
    if limits:
        best = max(limits, key=lambda name: statistics.median(sample.main for sample in samples[name]))
        rates = column(samples[OURS], "rate_GBps")
        bar = Bar(">=", 0.95)
        report.add_ratio("restore", f"{OURS} / best of fio", rates, samples[best], nbytes=nbytes, how=best, bar=bar)
    for other, limit in ((TORCH, 0.5), (MAPPED, 1.0), (SAFETENSORS, 1.0), (DCP, 1.0)):
        bar, how = Bar("<=", limit), "time of both"
        report.add_ratio("restore", f"{OURS} / {other}", samples[OURS], samples[other], nbytes=nbytes, how=how, bar=bar)
