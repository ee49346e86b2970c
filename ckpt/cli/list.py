"""`ckpt list [DIR | URL] [--tiers]`"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ckpt.cli.answer import GREEN, NONE, OK, RED, YELLOW, Answer, metrics, paint, plain, size, table
from ckpt.storage.object_urls import is_url
from ckpt.upkeep.census import look, look_into_store
from ckpt.upkeep.other_tiers import add_tiers
from ckpt.upkeep.room import shares_much, with_frees
from ckpt.upkeep.rows import COMMITTED, DAMAGED, Row

SUMMARY = "What checkpoints lie in a directory or an object store, newest first, and what else lies there."
_COLOURS = {COMMITTED: GREEN, DAMAGED: RED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", nargs="?", default=".", metavar="DIR", help="the directory, or a URL as s3://bucket/run1")
    parser.add_argument("--tiers", action="store_true", help="also say what has become of each on the way to other tiers")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: there is no such place, or it cannot be read.
    """
    rows = look_into_store(chosen.place) if is_url(chosen.place) else with_frees(look(Path(chosen.place)), Path(chosen.place))
    if chosen.tiers and not is_url(chosen.place):
        rows = add_tiers(rows, Path(chosen.place))
    committed = any(row.state == COMMITTED for row in rows)
    code = OK if committed else NONE
    document = {"place": chosen.place, "checkpoints": [dataclasses.asdict(row) for row in rows]}
    return Answer(code, document, _lines(chosen.place, rows))


def _lines(place: str, rows: list[Row]) -> list[str]:
    if not rows:
        return [f"'{place}' holds no checkpoint"]
    tiers = sorted({tier for row in rows for tier in row.where})
    has_metrics = any(row.metrics for row in rows)
    shares = any(row.frees is not None and shares_much(row.frees, row.bytes) for row in rows)
    head = ["name", "step", "number", "committed at", "size", *["frees"] * shares, "files", "ranks", "state"]
    head += [*tiers, *["metrics"] * has_metrics]
    cells = [[*_cells(row, tiers, shares), *[metrics(row.metrics) or "-"] * has_metrics] for row in rows]
    lines = table(head, cells, right=(1, 2, 4, 5, 6, 7) if shares else (1, 2, 4, 5, 6))
    return [lines[0], *(_coloured(line, row.state) for line, row in zip(lines[1:], rows, strict=True)), *_problems(rows)]


def _cells(row: Row, tiers: list[str], shares: bool) -> list[str]:
    numbers = [_number(row.step), _number(row.sequence)]
    state = row.state + (", latest" if row.latest else "") + (" (!)" if row.problem and row.state == COMMITTED else "")
    cells = [row.name, *numbers, row.created[:19].replace("T", " ") or "-", size(row.bytes)]
    cells += [*["-" if row.frees is None else size(row.frees)] * shares, str(row.files)]
    return [*cells, _number(row.world_size), state, *(row.where.get(tier, "-") for tier in tiers)]


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _coloured(line: str, state: str) -> str:
    return line.replace(state, paint(state, _COLOURS.get(state, YELLOW)), 1) if f"  {state}" in line else line


def _problems(rows: list[Row]) -> list[str]:
    return [plain(f"{row.name}: {row.problem}") for row in rows if row.problem]
