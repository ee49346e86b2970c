"""Memory that several tensors share, or one with itself."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """A tensor of the skeleton, the tensor that gets its elements, and the record that they are in."""

    source: torch.Tensor
    target: torch.Tensor
    record: str


def span(tensor: torch.Tensor) -> int:
    """The elements from its first to its last in memory."""
    if not tensor.numel():
        return 0
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses between which it lies."""
    begin = tensor.data_ptr()
    return begin, begin + span(tensor) * tensor.itemsize


class Intervals:
    """Memory that is taken, by addresses."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, tensor: torch.Tensor) -> bool:
        """False, and nothing is added, if it may overlap with what was added."""
        begin, end = extent(tensor)
        first, last = self._touched(begin, end)
        if first < last:
            return False
        self._begins.insert(first, begin)
        self._ends.insert(first, end)
        return True

    def cover(self, tensor: torch.Tensor) -> None:
        """Adds it, whatever it overlaps with."""
        begin, end = extent(tensor)
        first, last = self._touched(begin, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    def _touched(self, begin: int, end: int) -> tuple[int, int]:
        first = bisect.bisect_right(self._ends, begin)
        return first, max(first, bisect.bisect_left(self._begins, end))


def split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Those that may be filled in any order, and those whose targets overlap, which get what the last of them brings.

    Tensors that share memory in the same way as in the file get the same bytes from each other, so they are of the former.
    """
    clashing = {index for cluster in _clusters(pairs) if not _agree([pairs[at] for at in cluster]) for index in cluster}
    free = [pair for index, pair in enumerate(pairs) if index not in clashing]
    return free, [pairs[index] for index in sorted(clashing)]


def _clusters(pairs: Iterable[Pair]) -> Iterator[list[int]]:
    """The numbers of pairs whose targets have addresses in common, in groups that have none with each other."""
    end = 0
    cluster: list[int] = []
    for (begin, stop), index in sorted((extent(pair.target), index) for index, pair in enumerate(pairs)):
        if begin >= end and cluster:
            yield cluster
            cluster = []
        cluster.append(index)
        end = max(end, stop)
    if cluster:
        yield cluster


def _agree(pairs: list[Pair]) -> bool:
    """Whether each byte of their memory gets the same byte of the file from all of them."""
    places = {(pair.record, pair.target.data_ptr() - pair.source.storage_offset() * pair.source.itemsize) for pair in pairs}
    alike = all(pair.source.stride() == pair.target.stride() for pair in pairs)
    return len(pairs) == 1 or (len(places) == 1 and alike)


def lies_on_itself(tensor: torch.Tensor) -> bool:
    """Whether two of its elements share memory."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1):
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    if not tensor.numel() or any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return bool(tensor.numel())
    marks = torch.zeros(span(tensor), dtype=torch.bool, device="cpu")
    marks.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(marks.sum()) < tensor.numel()
