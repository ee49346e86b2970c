"""Where and with what a result was measured; every line of it says so."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

import ckpt
from ckpt import _native

ROOT = Path(__file__).resolve().parents[2]


def describe_run(directory: Path, scale: float) -> dict[str, Any]:
    """The fields that all lines of a run share."""
    commit, changed = git_state()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "command": shlex.join([Path(sys.executable).name, "-m", "bench.run", *sys.argv[1:]]),
        "scale": scale,
        "machine": describe_machine(directory),
        "versions": versions(),
        "clock": "time.monotonic() of the benchmark program",
    }


def describe_machine(directory: Path) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "file_system": file_system(directory),
        "load_average_1min": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "crc32_kernel": _native.crc32_kernels()[0],
    }


def versions() -> dict[str, str]:
    build = "dev (assertions and fault hooks)" if hasattr(_native, "set_fault") else "release"
    found = {"ckpt": ckpt.__version__, "native_build": build, "torch": torch.__version__, "python": platform.python_version()}
    if shutil.which("fio"):
        found["fio"] = output_of(["fio", "--version"])
    return found


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system(directory: Path) -> str:
    """Type, device and options of the file system that holds the directory, or will hold it once it is made."""
    while not directory.exists():
        directory = directory.parent
    mounts = [mount for mount in psutil.disk_partitions(all=True) if directory.resolve().is_relative_to(mount.mountpoint)]
    if not mounts:
        return "unknown"
    mount = max(mounts, key=lambda mount: len(mount.mountpoint))
    return f"{mount.fstype} on {mount.device} ({mount.opts})"


def git_state() -> tuple[str, bool]:
    """The commit, and whether files differ from it."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return "unknown", False
    commit = output_of(["git", "rev-parse", "--verify", "HEAD"]) or "none yet"
    return commit, bool(output_of(["git", "status", "--porcelain"]))


def output_of(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
