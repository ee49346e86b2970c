"""What was measured, for programs and for readers: JSON lines, and a table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure.sampling import Sample


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
