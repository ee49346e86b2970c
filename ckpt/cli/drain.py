"""`python -m ckpt drain NODE_ROOT [--once] [--rate 200MB/s]`"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from pathlib import Path

from ckpt.drain.drainer import Drainer
from ckpt.drain.stopping import Stop
from ckpt.quantities import parse_size

SUMMARY = "Carry the checkpoints on the disk of a node to the directory of the job."
_LOWEST_PRIORITY = 19


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("node_root", type=Path, help="the directory of one run on the node: it holds a node.json")
    parser.add_argument("--once", action="store_true", help="end as soon as nothing is left that can be done now")
    parser.add_argument(
        "--rebuild", action="store_true", help="the directory of the job was lost: make it anew, and carry what is newest there"
    )
    parser.add_argument("--rate", type=_rate, help="bytes a second, as in 200MB/s; else what the job has chosen")


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
    drainer = Drainer(chosen.node_root.absolute(), stop, chosen.rate, chosen.rebuild)
    drainer.run(once=chosen.once)
    return 1 if drainer.failed else 0


def _give_way_to_training() -> None:
    with contextlib.suppress(OSError):
        os.nice(_LOWEST_PRIORITY)
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import psutil

        with contextlib.suppress(psutil.Error):
            psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
