"""How things are measured: sides of a comparison in turn, every sample kept.

One clock for all: `time.monotonic()`, read by the benchmark itself, outside of what it measures.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

clock = time.monotonic

MIB = 1 << 20
GIB = 1 << 30

Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        directory: where files are written; a temporary directory is made in it, and removed.
        scale: factor on all sizes; 1 is what the bars are stated for.
        rounds: samples of each side; None: as the workload has it.
        iteration_s: forward plus backward of the training workloads, seconds; None: long enough for a flush behind it.
        rest_s: rest before each sample, seconds: deletions trim the disk behind our back.
        fio_grid: configurations of fio, `engine:depth:block`; empty: use the direct-write loop of this program instead.
        rivals: parts of the names of those to measure beside ours; empty: all that run here.
        parts: of a workload that has several; empty: all.
        pretended_cuda: a library that stands in for the CUDA driver where there is no GPU; host memory plays the device's then.
        writers, chunk_bytes: what a sweep tries.
    """

    directory: Path
    scale: float = 1.0
    rounds: int | None = None
    iteration_s: float | None = None
    rest_s: float = 0.3
    fio_grid: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    pretended_cuda: Path | None = None
    writers: tuple[int, ...] = (1, 2, 4, 8)
    chunk_bytes: tuple[int, ...] = (1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)

    def sized(self, nbytes: int) -> int:
        return max(1, int(nbytes * self.scale))

    def rounds_or(self, default: int) -> int:
        return default if self.rounds is None else self.rounds

    def settle(self) -> None:
        """Lets the disk finish what was asked of it before, so that no sample pays for another."""
        os.sync()
        time.sleep(self.rest_s)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A directory for the files of one workload, removed at the end whatever happens."""
        self.directory.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="run-", dir=self.directory))
        try:
            yield made
        finally:
            shutil.rmtree(made)


class Sample(NamedTuple):
    """One measurement."""

    started_s: float  # clock() when it began
    values: Values

    @property
    def quantity(self) -> str:
        """The name of the first value: what the sample is about."""
        return next(iter(self.values))

    @property
    def main(self) -> float:
        """The first value."""
        return self.values[self.quantity]


class Side(NamedTuple):
    """One of the things compared. `measure` does the work once and returns named values, the main one first."""

    name: str
    measure: Callable[[], Values]


Samples = dict[str, list[Sample]]


def interleave(sides: Sequence[Side], rounds: int, settle: Callable[[], None], warmup: int = 1) -> Samples:
    """Measures every side once a round, `warmup` rounds more beforehand that do not count.

    The order of a round is that of the one before turned around, and every other round begins one side later (AB BA BA AB,
    or ABC CBA BCA ACB ...): a drift of the machine meets all alike, and so does what a side leaves to the next.
    """
    samples: Samples = {side.name: [] for side in sides}
    for number in range(-warmup, rounds):
        for side in in_order(sides, number):
            settle()
            note(f"{'warm-up' if number < 0 else f'round {number + 1}/{rounds}'}: {side.name}")
            started_s = clock()
            values = side.measure()
            if number >= 0:
                samples[side.name].append(Sample(started_s, values))
    return samples


def in_order(sides: Sequence[Side], number: int) -> list[Side]:
    first = number // 2 % len(sides)
    rotated = [*sides[first:], *sides[:first]]
    return rotated if number % 2 == 0 else rotated[::-1]


def column(samples: Sequence[Sample], name: str) -> list[Sample]:
    """The same samples, seen as another of their values."""
    return [Sample(sample.started_s, {name: sample.values[name]}) for sample in samples]


def note(text: str) -> None:
    """Progress, on one line of the terminal; nothing where nobody looks."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}"[:150], end="", file=sys.stderr, flush=True)
