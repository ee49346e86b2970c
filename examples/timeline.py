"""Draw who did what when: training above, the save beneath it, for each way of saving."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

Record = dict[str, Any]

SHOWN = 5  # iterations
COMPUTE, UPDATE, BLOCKED = "#9db8d2", "#5b7fa6", "#d1495b"
CAPTURE, FLUSH, COMMIT, CARRY = "#edae49", "#66a182", "#2e4057", "#b5a7c9"
LEGEND = {
    "forward + backward": COMPUTE,
    "optimizer step": UPDATE,
    "training blocked": BLOCKED,
    "capture": CAPTURE,
    "flush": FLUSH,
    "commit": COMMIT,
    "on its way home": CARRY,
}
TRAINING, CAPTURING, FLUSHING, CARRYING = 2.0, 1.0, 0.0, -1.0  # the lanes


def draw(panels: list[tuple[str, list[Record], list[Record]]], path: Path) -> None:
    """One panel per (name, iterations, saves), all on the same time scale."""
    figure, axes = plt.subplots(len(panels), 1, sharex=True, figsize=(11, 1.9 * len(panels) + 1.2), layout="constrained")
    ends = [
        _panel(axis, name, _typical(iterations), saves) for axis, (name, iterations, saves) in zip(axes, panels, strict=True)
    ]
    axes[-1].set_xlim(0.0, 1.08 * max(ends))
    axes[-1].set_xlabel("seconds")
    handles = [Patch(color=colour, label=label) for label, colour in LEGEND.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _typical(iterations: list[Record]) -> list[Record]:
    """The consecutive ones that together take most nearly as long as so many median iterations."""
    expected = SHOWN * median(r["seconds"] for r in iterations)
    windows = [iterations[at : at + SHOWN] for at in range(max(1, len(iterations) - SHOWN + 1))]
    return min(windows, key=lambda w: abs(w[-1]["ended_at"] - w[0]["started_at"] - expected))


def _panel(axis: Axes, name: str, shown: list[Record], saves: list[Record]) -> float:
    """Draws one way of saving; returns when the last iteration shown ends."""
    origin, end = shown[0]["started_at"], shown[-1]["ended_at"]
    for record in shown:
        _bars(axis, TRAINING, origin, _training(record))
    for save in saves:
        if _committed_at(save) > origin and save["started_at"] < end:
            _bars(axis, CAPTURING, origin, [(save["started_at"], save["captured_at"], CAPTURE)])
            _bars(axis, FLUSHING, origin, _flushing(save))
    carried = [(_committed_at(save), save["durable_at"]) for save in saves if save.get("tier_at") and save["durable_at"]]
    # One at a time; those that came too late for it have stayed on the disk of the node.
    _bars(axis, CARRYING, origin, [(begin, min(home, end), CARRY) for begin, home in carried if begin < end])
    lanes = {TRAINING: "training", CAPTURING: "capture", FLUSHING: "flush, commit"} | ({CARRYING: "home"} if carried else {})
    axis.axvline(end - origin, color="black", linewidth=0.8, linestyle=":")
    axis.annotate(f" {len(shown)} iterations", (end - origin, 2.42), fontsize=8, va="top")
    axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
    axis.set_yticks([*lanes], [*lanes.values()])
    axis.set_ylim(min(lanes) - 0.5, 2.5)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return float(end - origin)


def _training(r: Record) -> Iterable[tuple[float, float, str]]:
    fenced_at = r["backward_at"] + r["fence_s"]  # the fence is the first thing the step does
    yield r["started_at"], r["backward_at"], COMPUTE
    yield r["backward_at"], fenced_at, BLOCKED
    yield fenced_at, r["updated_at"], UPDATE
    yield r["updated_at"], r["saved_at"], BLOCKED
    yield r["saved_at"], r["ended_at"], COMPUTE


def _flushing(r: Record) -> Iterable[tuple[float, float, str]]:
    straight = r.get("bytes_from_tensors", 0) > 0  # from the tensors to the disk: the flush begins with the capture
    yield r["started_at"] if straight else r["captured_at"], r["flushed_at"], FLUSH
    yield r["flushed_at"], _committed_at(r), COMMIT


def _committed_at(r: Record) -> float:
    """Where it lands first."""
    return float(r.get("tier_at", {}).get("node", r["durable_at"]))


def _bars(axis: Axes, lane: float, origin: float, spans: Iterable[tuple[float, float, str]]) -> None:
    for begin, end, colour in spans:
        left, right = max(begin - origin, 0.0), end - origin
        if right > left:
            axis.barh(lane, right - left, left=left, height=0.6, color=colour, linewidth=0)
