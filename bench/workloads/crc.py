"""CRC-32 on one core."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from functools import partial

from bench.measure.report import Report
from bench.measure.sampling import MIB, Settings, Side, Values, clock, interleave
from ckpt import _native

AT_LEAST_S = 0.05  # a sample repeats its work for so long
SIZES = {"from memory": 256 * MIB, "from cache": MIB // 2}
KERNELS: dict[str, Callable[[bytes], int]] = {
    "ckpt": _native.crc32,
    "ckpt, table kernel": partial(_native.crc32_with, "table"),
    "zlib.crc32": zlib.crc32,
}


def rate(kernel: Callable[[bytes], int], buffer: bytes) -> Values:
    repeats = 0
    started = clock()
    while clock() - started < AT_LEAST_S:
        kernel(buffer)
        repeats += 1
    return {"rate_GBps": repeats * len(buffer) / (clock() - started) / 1e9}


def measure_crc(settings: Settings, report: Report) -> None:
    for place, size in SIZES.items():
        buffer = os.urandom(max(MIB // 2, settings.sized(size)))
        if len({kernel(buffer) for kernel in KERNELS.values()}) != 1:
            raise AssertionError("the kernels disagree")
        sides = [Side(f"{name}, {place}", partial(rate, kernel, buffer)) for name, kernel in KERNELS.items()]
        samples = interleave(sides, settings.rounds_or(7), lambda: None)
        for name, column in samples.items():
            how = f"clock around calls on the same {len(buffer)} bytes, one thread, at least {AT_LEAST_S} s"
            report.add("crc", name, "GB/s", column, nbytes=len(buffer), how=how, kernel=_native.crc32_kernels()[0])
