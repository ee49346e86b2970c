"""`ckpt drain ROOT [--once] [--rebuild] [--rate 200MB/s]`

ROOT is the directory of a run on a node, whose checkpoints go home; or what home has of a place in an object store
(home/.remote/<place>), to which they go from home.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from ckpt.cli.answer import FAILED, OK, Answer, UsageError
from ckpt.drain import node as nodes
from ckpt.drain import remote_place, status
from ckpt.drain.drainer import Drainer
from ckpt.drain.journal import COPIED
from ckpt.drain.runs import find_runs
from ckpt.drain.stopping import Stop
from ckpt.drain.uploader import Uploader
from ckpt.errors import CheckpointError, NotACheckpointError
from ckpt.quantities import parse_size

SUMMARY = """Carry checkpoints from the disk of a node to the directory of the job, or from there to an object store. It ends
when nobody trains there any more and nothing is left, or by SIGTERM; what it does goes to standard error."""
_LOWEST_PRIORITY = 19


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "the directory of one run on the node: it holds a node.json; or one in .remote of the job's: it holds a remote.json"
    parser.add_argument("node_root", type=Path, metavar="root", help=text)
    parser.add_argument("--once", action="store_true", help="end as soon as nothing is left that can be done now")
    parser.add_argument(
        "--rebuild", action="store_true", help="the directory of the job was lost: make it anew, and carry what is newest there"
    )
    parser.add_argument("--rate", type=_rate, help="bytes a second, as in 200MB/s; else what the job has chosen")
    text = "read options of the object store from standard input, as a JSON object; else the environment says all of them"
    parser.add_argument("--options-from-stdin", action="store_true", help=text)


def _rate(text: str) -> int:
    with contextlib.suppress(ValueError):
        rate = parse_size(text.strip().removesuffix("/s"), "the rate")
        if rate > 0:
            return rate
    raise argparse.ArgumentTypeError(
        f"{text!r} is no rate: give bytes a second, more than 0, as in 200MB/s, 1.5GiB/s or 50000000"
    )


def run(chosen: argparse.Namespace) -> Answer | int:
    """
    Raises:
        CheckpointError: there is nothing to drain there, or somebody else does.
    """
    root = chosen.node_root.absolute()
    _refuse_all_runs(root)
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _give_way_to_training()
    failed = _upload(root, stop, chosen) if (root / remote_place.NAME).exists() else _bring_home(root, stop, chosen)
    code = FAILED if failed else OK
    if not chosen.json:
        return code
    checkpoints = [dataclasses.asdict(each) for each in status(root)]
    return Answer(code, {"root": str(root), "good": not failed, "stopped": stop.requested, "checkpoints": checkpoints})


def _upload(root: Path, stop: Stop, chosen: argparse.Namespace) -> bool:
    """Whether something that should be in the store is not."""
    if chosen.rebuild:
        raise UsageError("--rebuild is for the disk of a node, from which a lost directory of a job is made anew")
    uploader = Uploader(root, stop, chosen.rate, _options() if chosen.options_from_stdin else None)
    uploader.run(once=chosen.once)
    return uploader.failed


def _bring_home(root: Path, stop: Stop, chosen: argparse.Namespace) -> bool:
    """Whether something that should be at home is not."""
    arrived: list[int] = []
    say = (lambda _: None) if chosen.json else _say  # standard output is for the document

    def tell(step: int, path: Path) -> None:
        arrived.append(step)
        say(f"step {step} is at '{path}'")

    drainer = Drainer(root, stop, chosen.rate, rebuild=chosen.rebuild, told=tell)
    drainer.run(once=chosen.once)
    if not arrived and not drainer.failed and not stop.requested:
        say(_what_is_left(root))
    return drainer.failed


def _refuse_all_runs(root: Path) -> None:
    if not (root / nodes.NAME).exists() and (found := find_runs(root)):
        listed = "".join(f"\n  {run}" for run in found)
        raise NotACheckpointError(f"'{root}' is no run, but holds some: give the directory of one of them.{listed}")


def _what_is_left(root: Path) -> str:
    """Where nothing has come home."""
    waiting = next((each for each in status(root) if each.state == COPIED), None)
    if waiting is not None:
        return f"step {waiting.step} is delivered as far as it lies here, and waits for the drains of other nodes"
    return f"nothing that lies in '{root}' is left to be carried home"


def _say(text: str) -> None:
    """It may go to a log on a full disk, or to nobody: no reason to carry nothing home."""
    with contextlib.suppress(OSError):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _options() -> dict[str, str]:
    """
    Raises:
        CheckpointError: they are none.
    """
    try:
        return {str(key): str(value) for key, value in json.load(sys.stdin).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError("standard input holds no JSON object with the options of the store") from error


def _give_way_to_training() -> None:
    with contextlib.suppress(OSError):
        os.nice(_LOWEST_PRIORITY)
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import psutil

        with contextlib.suppress(psutil.Error):
            psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
