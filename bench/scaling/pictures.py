"""Pictures of scaling: one curve a side, medians with their extremes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, ScalarFormatter

from bench.measure.picture_style import GUIDE_COLOUR, Line, plt, styles, whiskers, write

QUANTITIES = {
    "rate_GBps": "aggregate rate (GB/s)",
    "durable_s": "until durable (s)",
    "slowest_flush_s": "slowest rank's flush (s)",
    "blocked_s": "training blocked (s)",
    "commit_s": "commit (s)",
}


def draw(lines: list[Line], path: Path) -> None:
    """A row for each kind of scaling, a column for each quantity.

    Raises:
        ValueError: there is nothing to draw.
    """
    kinds = list(dict.fromkeys(line["detail"]["kind"] for line in lines))
    if not kinds:
        raise ValueError("there are no lines of the workload 'scaling' to draw")
    sides = styles(line["detail"]["side"] for line in lines)
    shape = (len(kinds), len(QUANTITIES))
    size = (3.1 * shape[1], 2.8 * shape[0] + 0.8)
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    handles: dict[str, Any] = {}
    for row, kind in zip(axes, kinds, strict=True):
        for axis, (quantity, label) in zip(row, QUANTITIES.items(), strict=True):
            found = [line for line in lines if line["detail"]["kind"] == kind and line["quantity"] == quantity]
            for side, colour, mark in sides:
                points = sorted((line for line in found if line["detail"]["side"] == side), key=ranks_of)
                if points:
                    handles[side] = curve(axis, points, colour, mark)
            finish(axis, f"{kind} scaling", label, sorted({ranks_of(line) for line in found}))
            if quantity == "rate_GBps":
                add_ideal(axis, found)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    write(figure, path)


def ranks_of(line: Line) -> int:
    return int(line["detail"]["ranks"])


def curve(axis: Axes, points: list[Line], colour: str, mark: str) -> Any:
    return axis.errorbar(
        [ranks_of(line) for line in points],
        [line["median"] for line in points],
        yerr=whiskers(points),
        color=colour,
        marker=mark,
        markersize=4,
        capsize=2,
        lw=1,
    )


def add_ideal(axis: Axes, found: list[Line]) -> None:
    """The best rate of the fewest ranks, grown with the ranks."""
    fewest = min(map(ranks_of, found))
    most = max(map(ranks_of, found))
    best = max(line["median"] for line in found if ranks_of(line) == fewest)
    axis.plot([fewest, most], [best, best * most / fewest], color=GUIDE_COLOUR, lw=0.8, ls=":", zorder=0)


def finish(axis: Axes, title: str, label: str, ticks: list[int]) -> None:
    axis.set_xscale("log", base=2)
    if ticks:
        axis.set_yscale("log")
        axis.set_xticks(ticks)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.minorticks_off()
    axis.set_xlabel("ranks")
    axis.set_ylabel(label)
    axis.set_title(title, fontsize="medium")
    axis.grid(True, lw=0.3)
