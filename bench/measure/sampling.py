"""How things are measured: sides of a comparison in turn, every sample kept, medians beside their spread.

One clock for all: `time.monotonic()`, read by the benchmark itself, outside of what it measures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a result must reach."""

    relation: str  # "<=" or ">="
    limit: float

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:.4g}"


class Report:
    """The results of a run, as JSON lines that can be read one by one.

    Args:
        common: fields that every line carries: machine, versions, commit, command.
        scale: below 1 no bar is judged: they are stated for the full sizes.
        out: where flush() writes.
    """

    def __init__(self, common: dict[str, Any], scale: float, out: Path | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._out = out
        self._common = common
        self._scale = scale

    def add(
        self,
        workload: str,
        case: str,
        unit: str,
        samples: Sequence[Sample],
        *,
        nbytes: int,
        how: str,
        value: float | None = None,
        bar: Bar | None = None,
        judged: bool = True,
        **detail: Any,
    ) -> dict[str, Any]:
        """Adds one line.

        Args:
            samples: their main values are what the line is about.
            nbytes: how much one sample moves or holds.
            how: what the clock was put around, in words.
            value: what the bar judges; by default the median.
            judged: False: the bar is named, but what was measured is not what it is stated for.
        """
        numbers = [sample.main for sample in samples]
        median = statistics.median(numbers)
        low, high = quartiles(numbers)
        value = median if value is None else value
        line = {"workload": workload, "case": case, "quantity": samples[0].quantity, "unit": unit, "value": value}
        line |= {"median": median, "min": min(numbers), "max": max(numbers), "p25": low, "p75": high, "n": len(numbers)}
        judged = judged and self._scale >= 1
        line |= {"bar": None if bar is None else str(bar), "passed": bar.holds(value) if bar and judged else None}
        line |= {"bytes": nbytes, "how": how, "samples": numbers, "started_s": [sample.started_s for sample in samples]}
        line |= {"detail": detail, **self._common}
        self.lines.append(line)
        return line

    def add_ratio(
        self, workload: str, case: str, above: Sequence[Sample], below: Sequence[Sample], **more: Any
    ) -> dict[str, Any]:
        """The ratio of two sides: of their medians (this is what a bar judges), and round by round (the samples)."""
        if above[0].quantity != below[0].quantity:
            raise ValueError("only like can be compared with like")
        value = statistics.median(s.main for s in above) / statistics.median(s.main for s in below)
        ratios = [Sample(a.started_s, {"ratio": a.main / b.main}) for a, b in zip(above, below, strict=True)]
        return self.add(workload, case, "1", ratios, value=value, **more)

    def extend(self, lines: Sequence[dict[str, Any]]) -> None:
        """Takes over the lines of another process; what was typed to get them is this one's command."""
        self.lines += [line | {"command": self._common["command"]} for line in lines]

    def flush(self) -> None:
        """Writes what there is, if it goes to a file: what comes later may take long, and fail."""
        if self._out is not None:
            self.write(self._out)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    if len(numbers) < 2:
        return numbers[0], numbers[0]
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


VERDICTS = {True: "reached", False: "MISSED", None: ""}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The results for a reader: what a bar judges, the median, and the spread."""
    rows = [("workload", "case", "quantity", "value", "median", "min .. max", "n", "bar", "")]
    for line in lines:
        spread = f"{line['min']:.4g} .. {line['max']:.4g}"
        numbers = (f"{line['value']:.4g}", f"{line['median']:.4g}", spread, str(line["n"]))
        rows.append((line["workload"], line["case"], line["quantity"], *numbers, line["bar"] or "", VERDICTS[line["passed"]]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([text[0], "-" * (sum(widths) + 2 * len(widths) - 2), *text[1:]])
