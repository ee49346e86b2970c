"""fio as the judge of what a disk can do, where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path

_TIMEOUT_S = 300.0


class FioError(Exception):
    """It failed; in its own words."""


def measure_with_fio(directory: Path, size: int, threads: int, piece: int, *, direct: bool) -> float | None:
    """Bytes a second, from the first write to the end of the last fsync, of a new file that goes then; None: there is no fio.

    Args:
        size: how many bytes to write; threads: that write, `piece` bytes at a time.
        direct: past the page cache.

    Raises:
        FioError: it has failed.
    """
    program = shutil.which("fio")
    if program is None:
        return None
    path = temporary_path(directory / "trial")
    part = max(size // threads // piece, 1) * piece
    flags = [f"--filename={path}", "--ioengine=psync", f"--bs={piece}", f"--size={part}", f"--numjobs={threads}"]
    flags += [f"--offset_increment={part}", "--rw=write", f"--direct={int(direct)}", "--fallocate=native", "--end_fsync=1"]
    words = [program, "--name=trial", *flags, "--thread", "--group_reporting", "--output-format=json"]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S)
        return _rate_in(done.stdout, done.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FioError(str(error)) from error
    finally:
        durable.remove_quietly(path)


def _rate_in(output: str, errors: str) -> float:
    try:
        job = json.loads(output[output.index("{") :])["jobs"][0]
        rate, code = float(job["write"]["bw_bytes"]), int(job["error"])
    except (ValueError, LookupError, TypeError) as error:
        raise FioError(errors.strip()[:200] or output.strip()[:200] or "it gave no result") from error
    if code or rate <= 0:
        raise FioError(f"error {code}: {errors.strip()[:200]}")
    return rate
