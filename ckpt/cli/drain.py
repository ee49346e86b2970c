"""`python -m ckpt drain ROOT [--once] [--rate 200MB/s]`

ROOT is the directory of a run on a node, whose checkpoints go home; or what home has of a place in an object store
(home/.remote/<place>), to which they go from home.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from ckpt.drain import remote_place
from ckpt.drain.drainer import Drainer
from ckpt.drain.stopping import Stop
from ckpt.drain.uploader import Uploader
from ckpt.errors import CheckpointError
from ckpt.quantities import parse_size

SUMMARY = "Carry checkpoints from the disk of a node to the directory of the job, or from there to an object store."
_LOWEST_PRIORITY = 19


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "the directory of one run on the node: it holds a node.json; or one in .remote of the job's: it holds a remote.json"
    parser.add_argument("node_root", type=Path, metavar="root", help=text)
    parser.add_argument("--once", action="store_true", help="end as soon as nothing is left that can be done now")
    parser.add_argument("--rate", type=_rate, help="bytes a second, as in 200MB/s; else what the job has chosen")
    text = "read options of the object store from standard input, as a JSON object; else the environment says all of them"
    parser.add_argument("--options-from-stdin", action="store_true", help=text)


def _rate(text: str) -> int:
    rate = parse_size(text.strip().removesuffix("/s"), "the rate")
    if rate == 0:
        raise argparse.ArgumentTypeError("the rate must be more than nothing")
    return rate


def run(chosen: argparse.Namespace) -> int:
    """
    Raises:
        CheckpointError: there is nothing to drain there, or somebody else does.
    """
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _give_way_to_training()
    root = chosen.node_root.absolute()
    drainer: Drainer | Uploader
    if (root / remote_place.NAME).exists():
        drainer = Uploader(root, stop, chosen.rate, _options() if chosen.options_from_stdin else None)
    else:
        drainer = Drainer(root, stop, chosen.rate)
    drainer.run(once=chosen.once)
    return 1 if drainer.failed else 0


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
