"""The command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ckpt.cli import drain
from ckpt.errors import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if something has failed, and 2 for arguments that cannot be meant."""
    parser = argparse.ArgumentParser(prog="python -m ckpt", description="What belongs to checkpoints, beside the training.")
    commands = parser.add_subparsers(dest="command", required=True)
    drain.add_arguments(commands.add_parser("drain", help=drain.SUMMARY, description=drain.SUMMARY))
    chosen = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return drain.run(chosen)
    except CheckpointError as error:
        logging.getLogger("ckpt").error("%s", error)
        return 1
