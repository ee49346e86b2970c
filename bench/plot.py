"""Draws what the benchmarks have measured.

    python -m bench.run --workload rivals --workload frequency --workload sizes --out lines.jsonl
    python -m bench.plot lines.jsonl --out plots

Bars and points are medians, whiskers reach from the smallest to the largest sample. Each picture names machine, date, commit
and command. Exits with 1 if the lines hold nothing that can be drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure import picture_style
from bench.measure.picture_style import (
    CAPTION_SIZE,
    Line,
    caption,
    colour_of,
    plt,
    short,
    styles,
    whiskers,
)

NO_SAVING = "no saving"

Picture = tuple[str, Figure, list[Line]]  # file name without suffix, and the lines that were drawn


def read(paths: Iterable[Path]) -> list[Line]:
    """Of what was measured several times the last, where it stood first."""
    found = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line]
    return list({(line["workload"], line["case"], line["quantity"]): line for line in found}.values())


def pick(lines: Sequence[Line], workload: str, quantity: str) -> list[Line]:
    return [line for line in lines if (line["workload"], line["quantity"]) == (workload, quantity)]


def bars(axes: Axes, lines: Sequence[Line], title: str, unit: str, scale: float = 1.0) -> None:
    """A horizontal bar for each rival, the first at the top, its median written beside it."""
    names = [line["case"] for line in lines]
    values = [line["median"] * scale for line in lines]
    colours = [colour_of(name) for name in names]
    axes.barh(names, values, xerr=whiskers(lines, scale), color=colours, error_kw={"lw": 0.8, "capsize": 2})
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(unit)
    for place, (line, value) in enumerate(zip(lines, values, strict=True)):
        axes.annotate(f" {short(value)}", (line["max"] * scale, place), va="center", fontsize=7)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)


# ---- pictures --------------------------------------------------------------------------------------------------------


def blocked(lines: list[Line]) -> Picture | None:
    """How long a save holds training up, and how long the whole iteration then is."""
    held, iterations = pick(lines, "rivals", "blocked_s"), pick(lines, "rivals", "iteration_s")
    if not held:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    bars(left, held, "training held up by a save (log)", "ms", 1000)
    left.set_xscale("log")
    left.set_xlim(right=4 * left.get_xlim()[1])  # for what is written beside the longest
    bars(right, [line for line in iterations if line["case"] != NO_SAVING], "iteration with a save in it", "s")
    for line in iterations:
        if line["case"] == NO_SAVING:
            limit(right, line["median"], "without a save")
    return "rivals-blocked", figure, [*held, *iterations]


def limit(axes: Axes, value: float, label: str, style: str = "--") -> None:
    axes.axvline(value, color="black", lw=1, ls=style, label=f"{label}: {short(value)}")
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)  # above: no bar is there


def durable(lines: list[Line]) -> Picture | None:
    """How fast bytes become durable, against what the disk and the memory can do."""
    return rates(lines, "rivals", "rivals-durable") or rates(lines, "durable", "durable")


def rates(lines: list[Line], workload: str, name: str) -> Picture | None:
    found = pick(lines, workload, "rate_GBps")
    if not found:
        return None
    tops = [line for line in found if is_limit(line)]
    figure, axes = plt.subplots(figsize=(9, 4))
    bars(axes, [line for line in found if not is_limit(line)], "durable write rate", "GB/s")
    memory = [line for line in tops if line["case"] == "memcpy"]
    disk = max((line for line in tops if line not in memory), key=lambda line: line["median"], default=None)
    for line, style in ((disk, "--"), *((line, ":") for line in memory)):
        if line:
            limit(axes, line["median"], line["case"], style)
    return name, figure, found


def is_limit(line: Line) -> bool:
    return line["case"] == "memcpy" or line["case"].startswith(("fio", "own direct-write loop"))


def cost(lines: list[Line]) -> Picture | None:
    """What a restore takes, and how much memory a save."""
    restores, memory = pick(lines, "rivals", "restore_s"), pick(lines, "rivals", "extra_MiB")
    if not restores or not memory:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    bars(left, restores, "restore, from the disk", "s")
    bars(right, memory, "memory beside the state, peak", "MiB")
    return "rivals-restore-memory", figure, [*restores, *memory]


def frequency(lines: list[Line]) -> Picture | None:
    """Total time and iteration time over how often is saved."""
    totals = pick(lines, "frequency", "total_s")
    if not totals:
        return None
    settings = list(dict.fromkeys(line["detail"]["setting"] for line in totals))
    figure, grid = plt.subplots(2, len(settings), figsize=(5.5 * len(settings), 7), squeeze=False)
    for column, setting in enumerate(settings):
        for row, quantity in enumerate(("total_s", "iteration_s")):
            found = [line for line in pick(lines, "frequency", quantity) if line["detail"]["setting"] == setting]
            curves_by_frequency(grid[row][column], found, quantity)
        grid[0][column].set_title(f"compute {setting} than a flush", fontsize=9)
    return "frequency", figure, [*totals, *pick(lines, "frequency", "iteration_s")]


def curves_by_frequency(axes: Axes, lines: list[Line], quantity: str) -> None:
    # Iterations with and without a save differ on purpose: of these the mean is drawn.
    def height(line: Line) -> float:
        return line["median"] if quantity == "total_s" else sum(line["samples"]) / len(line["samples"])

    saving = [line for line in lines if line["detail"]["every"]]
    frequencies = sorted({line["detail"]["every"] for line in saving}, reverse=True)
    for name, colour, marker in styles(line["detail"]["engine"] for line in saving):
        curve = {line["detail"]["every"]: height(line) for line in saving if line["detail"]["engine"] == name}
        places = [frequencies.index(every) for every in curve]
        axes.plot(places, list(curve.values()), color=colour, marker=marker, label=name)
    for line in lines:
        if not line["detail"]["every"]:
            axes.axhline(height(line), color="black", lw=1, ls="--", label=NO_SAVING)
    axes.set_xticks(range(len(frequencies)), [str(every) for every in frequencies])
    axes.set_xlabel("iterations between saves")
    axes.set_ylabel(f"{lines[0]['detail']['iterations']} iterations, s" if quantity == "total_s" else "iteration, mean, s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def sizes(lines: list[Line]) -> Picture | None:
    """Blocked time and time until durable over the bytes of a state, the number of its tensors, and its shape."""
    found = [*pick(lines, "sizes", "blocked_s"), *pick(lines, "sizes", "durable_s")]
    if not found:
        return None
    labels = {"bytes": "bytes of the state", "tensors": "tensors in the state", "shape": ""}
    figure, grid = plt.subplots(2, len(labels), figsize=(14, 7.5))
    for column, (axis, label) in enumerate(labels.items()):
        for row, (quantity, what) in enumerate((("blocked_s", "held up"), ("durable_s", "until durable"))):
            drawn = [line for line in pick(found, "sizes", quantity) if line["detail"]["axis"] == axis]
            curves_by_size(grid[row][column], drawn, axis)
            grid[row][column].set_xlabel(label)
            grid[row][column].set_ylabel(f"{what}, s")
    return "sizes", figure, found


def curves_by_size(axes: Axes, lines: list[Line], axis: str) -> None:
    shapes = list(dict.fromkeys(line["detail"]["point"] for line in lines))
    for name, colour, marker in styles(line["detail"]["engine"] for line in lines):
        curve = [line for line in lines if line["detail"]["engine"] == name]
        places = [place_of(line, axis, shapes) for line in curve]
        medians, joined = [line["median"] for line in curve], "" if axis == "shape" else "-"
        axes.errorbar(places, medians, whiskers(curve), color=colour, marker=marker, ls=joined, capsize=2, lw=1.2, label=name)
    axes.set_yscale("log")
    if axis == "shape":
        axes.set_xticks(range(len(shapes)), [textwrap.fill(shape, 24) for shape in shapes], fontsize=8)
        axes.margins(x=0.5)
    else:
        axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)


def place_of(line: Line, axis: str, shapes: list[str]) -> float:
    if axis == "shape":
        return shapes.index(line["detail"]["point"])
    return float(line["bytes"] if axis == "bytes" else line["detail"]["tensors"])


PICTURES: tuple[Callable[[list[Line]], Picture | None], ...] = (blocked, durable, cost, frequency, sizes)


def draw(lines: list[Line], directory: Path) -> list[Path]:
    """Writes the pictures that these lines can fill; returns their paths."""
    made = []
    for picture in PICTURES:
        if drawn := picture(lines):
            made.append(write(*drawn, directory))
    return made


def write(name: str, figure: Figure, lines: list[Line], directory: Path) -> Path:
    text, path = caption(lines), directory / f"{name}.png"
    height = (text.count("\n") + 1) * CAPTION_SIZE * 1.3 / 72 / figure.get_figheight()  # of the caption, a part of the figure
    figure.text(0.01, 0.01, text, fontsize=CAPTION_SIZE, va="bottom", family="monospace")
    figure.tight_layout(rect=(0, min(0.5, height + 0.02), 1, 1))
    return picture_style.write(figure, path, dots_per_inch=160)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+", help="files of JSON lines, as bench.run --out writes them")
    parser.add_argument("--out", type=Path, default=Path("out/plots"), help="where the pictures go")
    asked = parser.parse_args(arguments)
    made = draw(read(asked.lines), asked.out)
    for path in made:
        print(path)
    if not made:
        print(
            "the lines hold nothing that can be drawn: run the workloads rivals, frequency, sizes or durable", file=sys.stderr
        )
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
