"""Virtual storages: the bytes that a set of views references, and nothing else.

A view of a large buffer is saved as the bytes between its first and its last element. Each connected run of overlapping
byte intervals becomes one virtual storage, so views that share memory share it again after a load.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class ByteInterval:
    """Bytes [low, high) of a storage, as elements of `itemsize` bytes."""

    low: int
    high: int
    itemsize: int


def byte_interval(offset: int, size: Sequence[int], stride: Sequence[int], itemsize: int) -> ByteInterval:
    """From the first to the last byte that a strided view references; empty if it has no elements.

    Strides are not negative (torch has none that are); offset, size and stride count elements.
    """
    if 0 in size:
        return ByteInterval(offset * itemsize, offset * itemsize, itemsize)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return ByteInterval(offset * itemsize, (last + 1) * itemsize, itemsize)


class VirtualStorages:
    """The runs into which the views of one storage fall, ascending."""

    def __init__(self, intervals: Sequence[ByteInterval]) -> None:
        self.runs: list[tuple[int, int]] = []
        widest = max((interval.itemsize for interval in intervals), default=1)
        for interval in sorted(intervals, key=lambda interval: interval.low):
            if interval.low == interval.high:
                continue
            # A run starts where every dtype in it has a whole number of elements before its views.
            low = interval.low - interval.low % widest
            if self.runs and low < self.runs[-1][1]:
                self.runs[-1] = (self.runs[-1][0], max(self.runs[-1][1], interval.high))
            else:
                self.runs.append((low, interval.high))
        self._lows = [run[0] for run in self.runs]

    def covers(self, nbytes: int) -> bool:
        """True if together the runs are the whole storage, gap-free."""
        edge = 0
        for low, high in self.runs:
            if low != edge:
                return False
            edge = high
        return edge == nbytes

    def find(self, interval: ByteInterval) -> int:
        """Index of the run that holds the interval; -1 if it is empty or in none."""
        index = bisect.bisect_right(self._lows, interval.low) - 1
        if index < 0 or interval.low == interval.high or interval.high > self.runs[index][1]:
            return -1
        return index
