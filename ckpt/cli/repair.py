"""`ckpt repair DIR [--yes]`"""

from __future__ import annotations

import argparse
from pathlib import Path

from ckpt.cli.answer import BAD, FAILED, GREEN, OK, RED, YELLOW, Answer, count, paint, plain
from ckpt.errors import CheckpointError
from ckpt.upkeep.repairing import LEAVE, REMOVE, Action, alone_in, plan

SUMMARY = """Mend what a crash has left in a directory of checkpoints: finalise what is complete, give files and bundles their
names, let 'latest' name the newest, remove the rest. Without --yes it only says what it would do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds the checkpoints of a job that has ended")
    parser.add_argument("--yes", action="store_true", help="do it")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: another job uses the directory, or it is none that can be repaired.
    """
    failed: dict[Path, str] = {}
    with alone_in(chosen.directory, changing=chosen.yes):
        actions = plan(chosen.directory)
        for action in actions if chosen.yes else ():
            try:
                action.apply()
            except (CheckpointError, OSError) as error:
                failed[action.path] = str(error)
    todo = [action for action in actions if action.do != LEAVE]
    code = FAILED if failed else BAD if len(todo) < len(actions) else OK
    document = {
        **{"directory": str(chosen.directory), "done": chosen.yes, "failed": {str(path): why for path, why in failed.items()}},
        "actions": [{"do": action.do, "path": str(action.path), "why": action.why} for action in actions],
    }
    return Answer(code, document, _lines(actions, todo, failed, chosen))


def _lines(actions: list[Action], todo: list[Action], failed: dict[Path, str], chosen: argparse.Namespace) -> list[str]:
    lines = []
    for action in actions:
        word = paint(action.do, RED if action.do == REMOVE else YELLOW if action.do == LEAVE else GREEN)
        lines.append(f"{word} {plain(str(action.path))}: {plain(action.why)}")
        if action.path in failed:
            lines.append(paint(f"  failed: {plain(failed[action.path])}", RED))
    left = len(actions) - len(todo)
    if not todo:
        lines.append("nothing is to be mended" + (f"; {count(left, 'thing')} left to you" if left else ""))
    elif chosen.yes:
        lines.append(f"{count(len(todo) - len(failed), 'thing')} mended")
    else:
        lines.append(f"{count(len(todo), 'thing')} to be mended: nothing was changed, --yes does it")
    return lines
