"""`ckpt status [DIR] [--stale DURATION] [--watch]`"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from ckpt.cli.answer import GREEN, NONE, OK, RED, STALE, YELLOW, Answer, age_s, cost, count, duration, paint, plain, show, size
from ckpt.quantities import parse_duration
from ckpt.upkeep.room import shares_much
from ckpt.upkeep.standing import Backlog, Standing, look_at

SUMMARY = """How a directory of checkpoints stands: who saves there, the last commit and its age, what is in flight, and
what drains have still to carry."""
_WATCH_S = 2.0
_CLOCKS_S = 5.0  # by which clocks of several machines may differ without a word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", type=Path, default=Path("."), metavar="DIR", help="at home, or on a node")
    text = "exit with 6 if the last commit, or file, is older, as in 30min, or a drain is stuck"
    parser.add_argument("--stale", type=_duration, metavar="DURATION", help=text)
    parser.add_argument("--watch", action="store_true", help=f"say it every {_WATCH_S:g} s, until interrupted")


def _duration(text: str) -> float:
    try:
        return parse_duration(text, "the duration")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(chosen: argparse.Namespace) -> Answer | int:
    """
    Raises:
        CheckpointError: there is no such directory, or it cannot be read.
    """
    answer = _answer(chosen)
    while chosen.watch:
        if not show(answer, "status", chosen.json, again=True):
            return OK
        time.sleep(_WATCH_S)
        answer = _answer(chosen)
    return answer


def _answer(chosen: argparse.Namespace) -> Answer:
    standing = look_at(chosen.directory)
    there = standing.newest is not None or standing.files is not None
    age = _age_s(standing)
    is_stale = chosen.stale is not None and (
        # One that is to come by this clock, which has gone back, or by that of the job, may be of any age.
        age is None or abs(age) > chosen.stale or any(backlog.stuck for backlog in standing.backlogs)
    )
    code = STALE if is_stale and there else OK if there else NONE
    document = {
        **{"directory": str(chosen.directory), "stale": is_stale, "age_s": age},
        **{"holder": standing.holder, "committed": standing.committed, "damaged": standing.damaged},
        **{"bytes": standing.bytes, "on_disk": standing.on_disk},
        "newest": None if standing.newest is None else dataclasses.asdict(standing.newest),
        "files": None if standing.files is None else dataclasses.asdict(standing.files),
        "in_flight": [dataclasses.asdict(row) for row in standing.in_flight],
        "backlogs": [dataclasses.asdict(backlog) for backlog in standing.backlogs],
    }
    return Answer(code, document, _lines(standing, age, is_stale))


def _age_s(standing: Standing) -> float | None:
    if standing.newest is not None:
        return age_s(standing.newest.created)
    return None if standing.files is None else time.time() - standing.files.written


def _about(standing: Standing) -> list[str]:
    newest, files = standing.newest, standing.files
    if files is not None:
        return [f"files: {files.count}, {size(files.bytes)}; each is a checkpoint by itself, and none is committed with others"]
    assert newest is not None
    return [*[cost(newest.cost, newest.world_size)] * bool(newest.cost), _committed(standing)]


def _committed(standing: Standing) -> str:
    text = f"committed: {standing.committed}, {size(standing.bytes)}"
    if shares_much(standing.on_disk, standing.bytes):
        text += f"; they take {size(standing.on_disk)} of the disk"
    return text


def _lines(standing: Standing, age: float | None, is_stale: bool) -> list[str]:
    lines = [f"job: {plain(standing.holder) if standing.holder else 'none saves here'}"]
    newest, files = standing.newest, standing.files
    when = "" if age is None else f", {duration(max(age, 0.0))} ago"
    if newest is None and files is None:
        lines += [paint("last commit: none", YELLOW), "committed: 0"]
    else:
        when = "" if age is None else f", {duration(abs(age))} {'ago' if age >= -_CLOCKS_S else 'from now, by this clock'}"
        text = f"last file: {plain(files.newest)}, {size(files.newest_bytes)}{when}" if files is not None else ""
        if newest is not None:
            text = f"last commit: {plain(newest.name)}, step {newest.step}, {size(newest.bytes)}{when}"
        lines.append(paint(f"{text} (stale)", RED) if is_stale else paint(text, GREEN))
        lines += _about(standing)
    if standing.damaged:
        lines.append(paint(f"damaged: {plain(', '.join(standing.damaged))}", RED))
    what = "in flight" if standing.holder else "left by a crash, or by a job that cannot be seen from here"
    lines += [f"{what}: {plain(row.name)}, {row.state}, {size(row.bytes)} so far" for row in standing.in_flight]
    return [*lines, *map(_backlog, standing.backlogs)]


def _backlog(backlog: Backlog) -> str:
    to = plain(backlog.target)
    who = "" if backlog.running else "; no drain is running"
    if not backlog.pending and not backlog.failed:
        return f"to {to}: {'all is there' if backlog.known else 'nothing was carried there yet'}{who}"
    rate = f" at {size(int(backlog.rate))}/s" if backlog.rate else ""
    text = f"to {to}: {count(backlog.pending, 'checkpoint')}, {size(backlog.bytes)} left{rate}{who}"
    if backlog.stuck:
        text += f"; {backlog.stuck} stuck"
    return text + (paint(f"; {backlog.failed} failed: {plain(backlog.text)}", RED) if backlog.failed else "")
