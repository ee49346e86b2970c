"""`ckpt verify PATH... [--fast]`"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

from ckpt.cli.answer import BAD, GREEN, OK, RED, YELLOW, Answer, count, paint, plain, size
from ckpt.cli.progress import Progress
from ckpt.upkeep import verifying
from ckpt.upkeep.verifying import Verdict

SUMMARY = """Whether checkpoints are what was written: the CRC-32 of each file, and of each record in files that carry such.
Of a directory of checkpoints all are verified."""
_COLOURS = {verifying.GOOD: GREEN, verifying.BAD: RED, verifying.MISSING: RED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="checkpoints, directories of some, or files")
    parser.add_argument("--fast", action="store_true", help="only manifests, headers and sizes: no other byte is read")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: one of the paths leads to no checkpoint, or cannot be read.
    """
    paths = [found for path in chosen.paths for found in verifying.find_checkpoints(path)]
    total = None if chosen.fast else verifying.total_bytes(paths)
    with Progress("verified", total) as told:
        verdicts = [verdict for path in paths for verdict in verifying.verify(path, chosen.fast, told)]
    counted = Counter(verdict.state for verdict in verdicts)
    bad = counted[verifying.BAD] + counted[verifying.MISSING]
    document = {
        **{"good": not bad, "fast": chosen.fast, "states": dict(counted)},
        "files": [dataclasses.asdict(verdict) for verdict in verdicts],
    }
    return Answer(BAD if bad else OK, document, [*_lines(verdicts), _summary(verdicts, counted, chosen.fast)])


def _lines(verdicts: list[Verdict]) -> list[str]:
    """Of what is not good; where all of a checkpoint is, one line."""
    lines = []
    by_checkpoint: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_checkpoint.setdefault(verdict.checkpoint, []).append(verdict)
    for path, found in by_checkpoint.items():
        others = [each for each in found if each.state not in (verifying.GOOD, verifying.ELSEWHERE)]
        if not others:
            lines.append(f"{plain(path)}: {paint(verifying.GOOD, GREEN)}")
        for each in others:
            state = paint(each.state, _COLOURS.get(each.state, YELLOW))
            lines.append(f"{plain(path)}: {plain(each.file)}: {state}: {plain(each.problem)}")
    return lines


def _summary(verdicts: list[Verdict], counted: Counter[str], fast: bool) -> str:
    good = sum(verdict.bytes for verdict in verdicts if verdict.state == verifying.GOOD)
    read = "only sizes were compared" if fast else f"{size(good)} verified"
    states = ", ".join(f"{number} {state}" for state, number in counted.items())
    return f"{count(len(verdicts), 'file')}: {states}; {read}"
