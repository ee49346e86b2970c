"""fio as the judge of what the disk can do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

GRID = tuple(
    f"{engine}:{depth}:{block}" for engine in ("psync", "io_uring") for depth in (1, 2, 4, 8) for block in ("1m", "4m", "8m")
)
TIMEOUT_S = 300
PIECE = 8 << 20
UNITS = {"k": 1 << 10, "m": 1 << 20}


class FioError(Exception):
    """fio is missing, or did not do what it was asked to."""


class Config(NamedTuple):
    """`psync` with as many jobs, or `io_uring` with one job of as many requests in flight."""

    engine: str
    depth: int
    block: str

    @classmethod
    def parse(cls, text: str) -> Config:
        match = re.fullmatch(r"(psync|io_uring):([1-9]\d*):(\d+[km])", text)
        if not match:
            raise FioError(f"'{text}' is no fio configuration: write engine:depth:block, such as psync:4:4m or io_uring:8:1m")
        return cls(match[1], int(match[2]), match[3])

    def __str__(self) -> str:
        return f"fio {self.engine} {self.depth} x {self.block}"

    @property
    def jobs(self) -> int:
        return self.depth if self.engine == "psync" else 1

    @property
    def block_bytes(self) -> int:
        return int(self.block[:-1]) * UNITS[self.block[-1]]


def available() -> bool:
    return shutil.which("fio") is not None


def command(config: Config, path: Path, nbytes: int) -> list[str]:
    """The same job as a save: a new file, allocated in one piece, written once, made durable. Each job has its part."""
    part = max(nbytes // config.jobs // config.block_bytes, 1) * config.block_bytes
    flags = [f"--filename={path}", f"--ioengine={config.engine}", f"--bs={config.block}", f"--size={part}"]
    if config.engine == "psync":
        flags += [f"--numjobs={config.jobs}", f"--offset_increment={part}"]
    else:
        flags += [f"--iodepth={config.depth}"]
    flags += ["--rw=write", "--direct=1", "--fallocate=native", "--end_fsync=1", "--thread", "--group_reporting"]
    return ["fio", "--name=limit", *flags, "--output-format=json"]


def read_command(config: Config, path: Path, nbytes: int) -> list[str]:
    """The same job as a load: the whole of a file that is there, once, past the page cache."""
    kept = [flag for flag in command(config, path, nbytes) if flag not in ("--rw=write", "--fallocate=native", "--end_fsync=1")]
    return [*kept, "--rw=read"]


def run_read(config: Config, path: Path, nbytes: int) -> float:
    """Bytes per second as fio reports them. The file is written first if it is not there in its size, and stays.

    Raises:
        FioError: with fio's own words.
    """
    if not path.exists() or path.stat().st_size < nbytes:
        with path.open("wb") as file:
            for begin in range(0, nbytes, PIECE):
                file.write(os.urandom(min(PIECE, nbytes - begin)))
            file.flush()
            os.fsync(file.fileno())
    try:
        done = subprocess.run(read_command(config, path, nbytes), capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FioError(str(error)) from error
    return parse(done.stdout, done.stderr, "read")


# glibc's malloc, from which fio has its buffers, then asks for huge pages where it maps memory.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def run(config: Config, path: Path, nbytes: int, huge_pages: bool = False) -> float:
    """Bytes per second as fio reports them: from the first write to the end of the last fsync.

    Starting, opening and allocating are outside of fio's clock, in its favour.

    Raises:
        FioError: with fio's own words.
    """
    path.unlink(missing_ok=True)
    env = os.environ | (HUGE_PAGES if huge_pages else {})
    try:
        done = subprocess.run(command(config, path, nbytes), env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
        return parse(done.stdout, done.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FioError(str(error)) from error
    finally:
        path.unlink(missing_ok=True)


def parse(output: str, errors: str, direction: str = "write") -> float:
    try:
        job = json.loads(output[output.index("{") :])["jobs"][0]
    except (ValueError, LookupError) as error:
        raise FioError(f"fio gave no result: {errors.strip() or output.strip()}") from error
    if job["error"] or not job[direction]["bw_bytes"]:
        raise FioError(f"fio failed with error {job['error']}: {errors.strip()}")
    return float(job[direction]["bw_bytes"])
