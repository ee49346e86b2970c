"""`ckpt doctor [DIR]`"""

from __future__ import annotations

import argparse
from pathlib import Path

from ckpt.cli.answer import BAD, GREEN, OK, RED, YELLOW, Answer, paint, plain
from ckpt.errors import NotACheckpointError
from ckpt.quantities import parse_size
from ckpt.upkeep import machine

SUMMARY = "What this machine, and a directory of it, can do for checkpoints; and what to do about what it cannot."
_COLOURS = {machine.GOOD: GREEN, machine.NOTE: YELLOW, machine.BAD: RED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="where checkpoints are to go: it is tried out")
    parser.add_argument("--size", type=_size, default=64 << 20, metavar="SIZE", help="how much to write there (64MiB)")


def _size(text: str) -> int:
    try:
        return parse_size(text, "the size")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        NotACheckpointError: there is no such directory.
    """
    if chosen.directory is not None and not chosen.directory.is_dir():
        raise NotACheckpointError(f"'{chosen.directory}' is no directory: make it, and ask again")
    found = machine.examine(chosen.directory, chosen.size)
    width = max(len(each.what) for each in found)
    lines = []
    for each in found:
        lines.append(f"{paint(each.verdict, _COLOURS[each.verdict])}  {each.what.ljust(width)}  {plain(each.found)}")
        lines += [f"      {' ' * width}  -> {each.remedy}"] * bool(each.remedy)
    is_bad = any(each.verdict == machine.BAD for each in found)
    return Answer(BAD if is_bad else OK, {"good": not is_bad, "findings": [each._asdict() for each in found]}, lines)
