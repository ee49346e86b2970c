"""How much memory a rival needs on top of the state: in a process of its own, all its children counted.

python -m bench.rivals.memory_need NAME BYTES DIRECTORY   # the measured process says when it is ready and when it has ended
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SAVES = 3
TENSORS = 64
LOOK_EVERY_S = 0.03  # each look walks all page tables of the process
TIMEOUT_S = 300.0
MIB = 1 << 20
HOW = (
    f"a process of its own saves {SAVES} times in a row, each until it is durable: the sum of the proportional set sizes of it "
    f"and all its children, looked at every {LOOK_EVERY_S * 1000:g} ms from outside, the peak less what it was when the state "
    "stood and the engine was not open; the page cache is not in it"
)


def extra_memory(name: str, nbytes: int, directory: Path) -> float:
    """MiB.

    Raises:
        RuntimeError: the measured process failed, or took longer than `TIMEOUT_S`; the message says what it said.
    """
    with tempfile.TemporaryDirectory(prefix="memory-", dir=directory) as own:  # its checkpoints go before the next one's come
        return _measure(name, nbytes, Path(own))


def _measure(name: str, nbytes: int, directory: Path) -> float:
    log = directory / "memory.log"
    command = [sys.executable, "-m", "bench.rivals.memory_need", name, str(nbytes), str(directory)]
    with log.open("w+", encoding="utf-8") as said:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        assert child.stdin and child.stdout
        try:
            if child.stdout.readline() != b"ready\n":
                raise RuntimeError(f"{name}: the measured process failed before it began:\n{log.read_text()[-2000:]}")
            process = psutil.Process(child.pid)
            before = peak = proportional(process)
            child.stdin.write(b"go\n")
            child.stdin.flush()
            peak = watch(child, process, peak)
            if child.returncode != 0:
                raise RuntimeError(f"{name}: the measured process failed:\n{log.read_text()[-2000:]}")
        finally:
            child.kill()  # also where it is still running after an error
            child.wait()
            child.stdin.close()
            child.stdout.close()
    return (peak - before) / MIB


def watch(child: subprocess.Popen[bytes], process: psutil.Process, peak: int) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while child.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the measured process took longer than {TIMEOUT_S:g} s")
        try:
            peak = max(peak, proportional(process))
        except psutil.NoSuchProcess:
            continue  # it, or a child, has just ended
        time.sleep(LOOK_EVERY_S)
    return peak


def proportional(process: psutil.Process) -> int:
    """Bytes: what processes share is counted once."""
    return sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True)))


def main() -> None:
    # Here, because only the measured process needs them.
    import torch

    from bench.rivals import registry

    name, nbytes, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    elements = max(1, nbytes // TENSORS // 4)
    state = {"model": {f"tensor{i}": torch.randn(elements) for i in range(TENSORS)}}
    registry.all_rivals()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print("ready", flush=True)
    sys.stdin.readline()
    field = registry.start([name], directory / "checkpoints", lazy=True)
    if field.errors:
        raise RuntimeError(field.errors[name])
    rival = field.rivals[name]
    for _ in range(SAVES):
        rival.save(state)
        rival.before_step()
        rival.finish()
        rival.synchronise()
        rival.prune()
    rival.close()


if __name__ == "__main__":
    main()
