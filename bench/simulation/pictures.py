"""Pictures of the simulation: beside the paper, beside real saves, and further on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from bench.measure.picture_style import COLOURS, GUIDE_COLOUR, OUR_COLOUR, OUR_LIGHT_COLOUR, THEIR_COLOUR, Line, plt, write
from bench.simulation.scale import FREE, Study

# The level that limits, as a mark; free of charge: a dot.
MARKS = {"-": ".", "save() itself": "D", "D2H link": "^", "node disk": "o", "node link": "v", "file system": "s", "commit": "P"}


def draw(lines: Sequence[Line], studies: Sequence[Study], directory: Path) -> list[Path]:
    """Draws what there is lines for; returns the pictures."""
    made = []
    beside_paper = [line for line in lines if line["case"].startswith("published")]
    beside_real = [line for line in lines if line["case"].startswith("validation")]
    if beside_paper:
        made.append(draw_published(beside_paper, directory / "published.png"))
    if beside_real:
        made.append(draw_validation(beside_real, directory / "validation.png"))
    if studies:
        made.append(draw_scale(studies, directory / "scale.png"))
    return made


def draw_published(lines: list[Line], path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    lazy = [line for line in lines if line["case"].endswith("lazy")]
    copied = [line for line in lines if not line["case"].endswith("lazy")]
    columns = [
        ("paper", THEIR_COLOUR, [line["detail"]["published_GBps"] for line in lazy]),
        ("simulated, lazy", OUR_COLOUR, [line["detail"]["rate_GBps"] for line in lazy]),
        ("simulated, copied in save()", OUR_LIGHT_COLOUR, [line["detail"]["rate_GBps"] for line in copied]),
    ]
    for at, (label, colour, heights) in enumerate(columns):
        axis.bar([place + 0.27 * (at - 1) for place in range(len(lazy))], heights, 0.25, label=label, color=colour)
    names = [line["case"].split(", ")[1].replace(" on ", "\n") for line in lazy]
    axis.set_xticks(range(len(lazy)), names)
    axis.set_yscale("log")
    axis.set_ylabel("checkpoint bytes / time blocked (GB/s)")
    axis.legend(frameon=False)
    return write(figure, path)


def draw_validation(lines: list[Line], path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(4.2, 4), layout="constrained")
    for colour, role in zip((OUR_LIGHT_COLOUR, OUR_COLOUR), ("calibrates", "predicted"), strict=True):
        shown = [line for line in lines if line["detail"]["role"] == role]
        real = [mean(line["detail"]["real_blocked_s"]) for line in shown]
        axis.loglog(real, [mean(line["samples"]) for line in shown], "o", color=colour, label=role)
    low, high = axis.get_xlim()
    axis.plot([low, high], [low, high], color=GUIDE_COLOUR, lw=0.8, ls=":")
    axis.set_xlabel("blocked by a real save (s)")
    axis.set_ylabel("by a simulated one (s)")
    axis.legend(frameon=False)
    return write(figure, path)


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def draw_scale(studies: Sequence[Study], path: Path) -> Path:
    """Time lost over the interval; one panel for each way in which the checkpoint grows."""
    growths = list(dict.fromkeys(study.case.growth for study in studies))
    figure, axes = plt.subplots(
        1, len(growths), figsize=(4.6 * len(growths), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, growth in zip(axes[0], growths, strict=True):
        shown = [study for study in studies if study.case.growth == growth]
        for colour, study in zip(COLOURS, shown, strict=False):
            draw_curve(axis, study, colour)
        axis.axhline(100 * FREE, color=GUIDE_COLOUR, lw=0.8, ls=":")
        axis.set_title(growth, fontsize="medium")
        axis.set_xlabel("seconds of training between saves")
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.legend(frameon=False, fontsize="x-small")
    axes[0][0].set_ylabel("training time lost (%)")
    limits = {study.limit_at(interval_s) for study in studies for interval_s in study.lost}
    used = [limit for limit in MARKS if limit in limits]
    marks = [plt.Line2D([], [], color="0.3", ls="", marker=MARKS[limit]) for limit in used]
    names = [f"at most {FREE:.0%}" if limit == "-" else f"limit: {limit}" for limit in used]
    figure.legend(marks, names, loc="outside lower center", ncols=len(used), frameon=False, fontsize="small")
    return write(figure, path)


def draw_curve(axis: Axes, study: Study, colour: str) -> None:
    seconds, lost = list(study.lost), [100 * share for share in study.lost.values()]
    axis.plot(seconds, lost, color=colour, lw=1, label=f"{study.case.gpus:,} GPUs, {study.case.way}")
    for x, y in zip(seconds, lost, strict=True):
        axis.plot(x, y, color=colour, marker=MARKS[study.limit_at(x)], markersize=5)
