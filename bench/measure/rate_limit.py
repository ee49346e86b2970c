"""A limit on what one process writes, so that the shape of scaling shows on a machine with a single disk.

A small library (rate_limit.c) is compiled and preloaded into the processes that are measured. It stands between all of them
and the kernel, so ours and its rivals are slowed in the same way, and a release build needs no hook for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ckpt.quantities import parse_size

SOURCE = Path(__file__).with_suffix(".c")
VARIABLE = "RANK_RATE_BYTES_PER_S"
PLACE = "RANK_RATE_PLACE"


def parse_rate(text: str) -> int:
    """Bytes per second of a text such as "200MB/s" or "1GiB/s".

    Raises:
        ValueError: it is not a rate, or none above zero.
    """
    rate = parse_size(text.strip().removesuffix("/s"), "rate")
    if rate == 0:
        raise ValueError(f"a rate must be above zero, but is {text!r}")
    return rate


def limited(environment: Mapping[str, str], bytes_per_s: int, directory: Path, below: Path | None = None) -> dict[str, str]:
    """The environment of a process whose writes go no faster than this.

    Args:
        directory: where the compiled library is put.
        below: only writes to files in this directory, and those in it; None: all.

    Raises:
        RuntimeError: there is no C compiler, or it does not compile here.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("a limit on the rate of a rank needs a C compiler (cc, gcc or clang), and none was found")
    library = directory / "rate_limit.so"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run([*command, "-pthread"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{SOURCE.name} could not be compiled: {done.stderr.strip()}")
    before = environment.get("LD_PRELOAD")
    preload = f"{library}:{before}" if before else str(library)
    limits = {"LD_PRELOAD": preload, VARIABLE: str(bytes_per_s)}
    if below is not None:
        limits[PLACE] = f"{below.absolute()}{os.sep}"
    return dict(environment) | limits


def active_rate() -> float | None:
    """The limit of this process, bytes per second; None if it has none."""
    return float(os.environ[VARIABLE]) if VARIABLE in os.environ else None
