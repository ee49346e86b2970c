"""What this machine can do for checkpoints, and what to do about what it cannot."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ckpt import _native
from ckpt.errors import CheckpointError
from ckpt.storage import trial
from ckpt.storage.fio import FioError, measure_with_fio
from ckpt.storage.mounts import mount_of

GOOD, NOTE, BAD = "good", "note", "bad"
_OLDEST_TORCH, _NEWEST_TORCH = (2, 6), (2, 15)  # that were tested: as TESTED in ckpt/torch_private.py has them
_OPTIONAL = {"obstore": "object stores", "mpi4py": "jobs that talk by MPI", "tqdm": "progress bars of this command line"}
_MEMLOCK_BYTES = 64 << 20  # less than that pins no arena
DRIVER = "libcuda.so.1"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_DEVICE_S = 5.0
_VERDICTS = {"passed": GOOD, "failed": BAD}
_DEVICE_REMEDIES = {
    "failed": "Options(device_lazy=False) copies tensors on it inside of save(), which is right, and slower; update the driver",
    "inconclusive": "nothing leaves it in the background before it has shown that it keeps order: ask again while it is idle",
    "late": "it is busy, or hangs: ask again while it is idle",
}
_SLOW = 0.8  # of what fio finds: then something is worth a look


class Finding(NamedTuple):
    """`found`: what there is; `remedy`: what to do about it, if anything; else empty."""

    what: str
    verdict: str
    found: str
    remedy: str = ""


def examine(directory: Path | None, size: int) -> list[Finding]:
    """
    Args:
        directory: tried out, if given.
        size: how many bytes to write there, to see how fast it is.
    """
    found = [*_software(), *_devices(), _memlock(), *_huge_pages()]
    return found if directory is None else [*found, *_directory(directory, size)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _software() -> Iterator[Finding]:
    build = "with fault hooks, for tests" if hasattr(_native, "set_fault") else "release"
    kernel, python = _native.crc32_kernels()[0], sys.version.split()[0]
    yield Finding(
        "lazyckpt",
        GOOD,
        f"{_version('lazyckpt') or 'not installed as a package'}, {build}; CRC-32 by {kernel}; Python {python}",
    )
    torch = _version("torch")
    numbers = re.match(r"(\d+)\.(\d+)", torch or "")
    if torch is None or numbers is None:
        yield Finding("torch", BAD, "not installed", "install it: only drains and this command line do without")
    elif (int(numbers[1]), int(numbers[2])) < _OLDEST_TORCH:
        yield Finding("torch", BAD, torch, f"install {'.'.join(map(str, _OLDEST_TORCH))} or newer")
    elif (int(numbers[1]), int(numbers[2])) > _NEWEST_TORCH:
        remedy = f"newer than what was tested, up to {'.'.join(map(str, _NEWEST_TORCH))}: take that if anything is amiss"
        yield Finding("torch", NOTE, torch, remedy)
    else:
        yield Finding("torch", GOOD, torch)
    for package, use in _OPTIONAL.items():
        version = _version(package)
        remedy = "" if version else f"install it for {use}"
        yield Finding(package, GOOD if version else NOTE, version or "not installed", remedy)


def _devices() -> Iterator[Finding]:
    """Of CUDA, without torch: the driver, and of each device what ckpt.check_devices() finds."""
    try:
        driver = ctypes.CDLL(DRIVER)
        count, version = ctypes.c_int(), ctypes.c_int()
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
        failed = failed or driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        yield Finding("CUDA driver", NOTE, "none", "tensors on CUDA devices need one")
        return
    if failed == _NO_DEVICE:
        yield Finding("CUDA driver", NOTE, "there, but it finds no device", "see whether CUDA_VISIBLE_DEVICES hides them")
    elif failed:
        yield Finding("CUDA driver", BAD, f"its first call failed ({failed})", "reinstall the driver, or restart the machine")
    else:
        yield Finding("CUDA driver", GOOD, f"{version.value // 1000}.{version.value % 1000 // 10}, {count.value} devices")
        yield from map(_device, range(count.value))


def _device(number: int) -> Finding:
    """Whether it keeps the order that saving in the background relies on."""
    try:
        verdict, reason = _native.check_device(number, _DEVICE_S, DRIVER)
    except CheckpointError as error:
        verdict, reason = "failed", str(error)
    text = f"{verdict}: {reason}" if reason else verdict
    return Finding(f"CUDA device {number}", _VERDICTS.get(verdict, NOTE), text, _DEVICE_REMEDIES.get(verdict, ""))


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", GOOD, "no limit")
    enough = soft >= _MEMLOCK_BYTES
    remedy = "" if enough else "raise it (ulimit -l), if devices are saved from: their copies go through pinned memory"
    return Finding("locked memory", GOOD if enough else NOTE, f"at most {soft >> 10} KiB", remedy)


def _huge_pages() -> Iterator[Finding]:
    with contextlib.suppress(OSError):
        text = _HUGE_PAGES.read_text(encoding="ascii")
        chosen = re.search(r"\[(\w+)\]", text)
        remedy = f"write madvise to {_HUGE_PAGES}: small pages make staging memory dearer to pin, and to write from"
        never = chosen is not None and chosen[1] == "never"
        found = f"transparent: {chosen[1] if chosen else text.strip()}"
        yield Finding("huge pages", NOTE if never else GOOD, found, remedy if never else "")


def _directory(directory: Path, size: int) -> Iterator[Finding]:
    mount = mount_of(directory)
    if mount is not None:
        yield Finding("file system", GOOD, f"{mount.kind} at {mount.point}")
    try:
        usage = shutil.disk_usage(directory)
        yield Finding("space", GOOD if usage.free > size else BAD, f"{usage.free >> 20} MiB free of {usage.total >> 20} MiB")
        found = trial.try_out(directory, min(size, usage.free // 2))
    except (CheckpointError, OSError) as error:
        yield Finding("directory", BAD, str(error), "choose another one, or mend its permissions")
        return
    remedy = (
        "" if found.locks else "nothing keeps two jobs from saving here at once: see to that yourself, or mount it with locks"
    )
    yield Finding("locks", GOOD if found.locks else BAD, "yes" if found.locks else "no", remedy)
    yield Finding(
        "rename and fsync", GOOD if found.renames else BAD, found.why or "yes", "" if found.renames else "take another"
    )
    remedy = "" if found.direct else "bytes go through the page cache, which costs memory bandwidth; a local disk would not"
    text = f"yes, in multiples of {found.align} bytes" if found.direct else "no"
    yield Finding("direct I/O", GOOD if found.direct else NOTE, text, remedy)
    yield _rate(found, directory, min(size, usage.free // 2))


def _rate(found: trial.Trial, directory: Path, size: int) -> Finding:
    how = f"{trial.THREADS} threads, {size >> 20} MiB, flushed"
    text = f"{found.rate / 1e6:.0f} MB/s, {how}"
    try:
        judged = measure_with_fio(directory, size, trial.THREADS, trial.PIECE_BYTES, direct=found.direct)
    except FioError as error:
        return Finding("write rate", GOOD, f"{text}; fio failed: {error}")
    if judged is None:
        return Finding("write rate", GOOD, text, "install fio, and its rate stands beside it")
    text += f"; fio {judged / 1e6:.0f} MB/s"
    if found.rate >= _SLOW * judged:
        return Finding("write rate", GOOD, text)
    return Finding("write rate", NOTE, text, "ask again with --size 1GiB; if it stays so, see what else writes there")
