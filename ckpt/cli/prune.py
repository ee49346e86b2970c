"""`ckpt prune DIR --keep N [--keep-every K] [--keep-best N --best-by METRIC] [--yes]`"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ckpt.cli.answer import FAILED, OK, RED, YELLOW, Answer, count, paint, plain, size
from ckpt.directory.keeping import Keeping
from ckpt.errors import CheckpointError
from ckpt.upkeep.pruning import HELD, REMOVED, Choice, choose, decide, remove, with_frees
from ckpt.upkeep.repairing import alone_in
from ckpt.upkeep.room import shares_much

SUMMARY = "Remove all checkpoints of a directory but the newest. Without --yes it only says what it would do."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds the checkpoints of a job that has ended")
    parser.add_argument("--keep", type=_count, required=True, metavar="N", help="how many of the newest stay")
    parser.add_argument("--keep-every", type=_count, metavar="K", help="steps that are multiples of it stay, too")
    parser.add_argument("--keep-best", type=_count, metavar="N", help="so many of the best stay, too, by --best-by")
    parser.add_argument("--best-by", default="", metavar="METRIC", help="which of the metrics that were given to save()")
    parser.add_argument(
        "--best-mode", choices=("min", "max"), default="min", help="whether the lowest is the best, or the highest"
    )
    parser.add_argument("--yes", action="store_true", help="do it")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count, 1 or more")
    return int(text)


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: another job uses the directory, or there is no checkpoint; or only one of --keep-best and --best-by is
            given, or none has that metric; or the newest that would stay is damaged.
    """
    keeping = _keeping(chosen)
    failed: dict[str, str] = {}
    with alone_in(chosen.directory, changing=chosen.yes):
        choices, freed = with_frees((decide if chosen.yes else choose)(chosen.directory, keeping))
        for choice in reversed(choices) if chosen.yes else ():
            if choice.fate == REMOVED:
                try:
                    remove(choice)
                except (CheckpointError, OSError) as error:
                    failed[str(choice.path)] = str(error)
    document = {
        **{"directory": str(chosen.directory), "done": chosen.yes, "failed": failed, "frees": freed},
        "checkpoints": [{**dataclasses.asdict(choice), "path": str(choice.path)} for choice in choices],
    }
    return Answer(FAILED if failed else OK, document, _lines(choices, freed, failed, chosen))


def _keeping(chosen: argparse.Namespace) -> Keeping:
    if (chosen.keep_best is None) != (not chosen.best_by):
        raise CheckpointError("--keep-best says how many stay, and --best-by by which metric: give both, or neither")
    return Keeping(chosen.keep, chosen.keep_every, chosen.keep_best, chosen.best_by, chosen.best_mode)


def _lines(choices: list[Choice], freed: int, failed: dict[str, str], chosen: argparse.Namespace) -> list[str]:
    lines = []
    for choice in choices:
        word = paint(choice.fate, {REMOVED: RED, HELD: YELLOW}[choice.fate]) if choice.fate in (REMOVED, HELD) else choice.fate
        why = f": {choice.why}" if choice.why else ""
        shared = f" (alone it gives back {size(choice.frees)})" if shares_much(choice.frees, choice.bytes) else ""
        lines.append(f"{word} {plain(choice.path.name)}, {size(choice.bytes)}{shared}{why}")
        if str(choice.path) in failed:
            lines.append(paint(f"  failed: {plain(failed[str(choice.path)])}", RED))
    going = [choice for choice in choices if choice.fate == REMOVED]
    total = sum(choice.bytes for choice in going)
    gives = f", which give back {size(freed)}," if shares_much(freed, total) else ""
    what = f"{count(len(going), 'checkpoint')} of {size(total)}{gives}"
    if chosen.yes:
        return [*lines, f"{what} removed" + (f", {len(failed)} of them not to the end" if failed else "")]
    return [*lines, f"{what} would go: nothing was changed, --yes does it" if going else "nothing would go"]
