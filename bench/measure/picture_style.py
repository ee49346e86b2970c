"""How all pictures of results look: one colour for ours everywhere, and what is written below and beside."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Line = dict[str, Any]

OURS = "ckpt"
OUR_COLOUR, THEIR_COLOUR = "#d55e00", "#6e8fb0"
OUR_LIGHT_COLOUR = "#f2b48a"  # of ours, used in another way
GUIDE_COLOUR = "0.6"  # of lines that help to read
# Okabe and Ito's colours, which readers with any colour vision can tell apart; ours is none of them.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6d3b", "#7f3c8d", "#444444", "#999933", "#117733")
MARKERS = "os^vDPX<>*"
CAPTION_WIDTH, CAPTION_SIZE = 150, 6.5  # characters, points


def caption(lines: Sequence[Line]) -> str:
    """Machine, date, commit and command of what was drawn; several, if the lines come from several runs."""
    texts = {}
    for line in lines:
        machine, versions = line["machine"], line["versions"]
        text = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        text += f"Linux {machine['kernel']}, {machine['file_system']}; torch {versions['torch']}, "
        text += f"ckpt {versions['ckpt']} at {line['commit'][:12]}; "
        scale = "" if line["scale"] == 1 else f"; scale {line['scale']}"
        texts[f"{text}{line['date']}; {line['command']}{scale}"] = None
    return "\n".join(textwrap.fill(text, CAPTION_WIDTH) for text in texts)


def whiskers(lines: Sequence[Line], scale: float = 1.0) -> list[list[float]]:
    return [
        [(line["median"] - line["min"]) * scale for line in lines],
        [(line["max"] - line["median"]) * scale for line in lines],
    ]


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def is_ours(name: str) -> bool:
    """Also where it stands there with the way it is used: "ckpt, striped"."""
    return name.partition(",")[0] == OURS


def colour_of(name: str) -> str:
    """Where there are only two kinds: ours, and all others."""
    if name == OURS:
        return OUR_COLOUR
    return OUR_LIGHT_COLOUR if is_ours(name) else THEIR_COLOUR


def styles(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, colour, marker) of each rival, in the order in which they come: ours in our colour, whatever its marker."""
    found = list(dict.fromkeys(names))
    others = [name for name in found if not is_ours(name)]
    colours = dict.fromkeys(found, OUR_COLOUR) | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return [(name, colours[name], MARKERS[i % len(MARKERS)]) for i, name in enumerate(found)]


def write(figure: Figure, path: Path, dots_per_inch: int = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dots_per_inch)
    plt.close(figure)
    return path
