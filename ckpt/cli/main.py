"""The command line: `ckpt COMMAND ...`, which is `python -m ckpt COMMAND ...`.

Only the module of the command that was asked for is imported: what needs no torch starts at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ckpt.cli.answer import BAD, FAILED, IN_USE, INTERRUPTED, NONE, Answer, UsageError, show
from ckpt.errors import CheckpointError, InUseError, NotACheckpointError, StorageError

COMMANDS = {
    "list": "what checkpoints lie in a directory or an object store",
    "show": "what a checkpoint or a file consists of: manifest, files, tensors",
    "verify": "whether checkpoints are what was written: every checksum, or only sizes",
    "repair": "mend what a crash has left in a directory of checkpoints",
    "prune": "remove all checkpoints of a directory but the newest",
    "status": "who saves in a directory, the last commit and its age, and what is left to be carried on",
    "trace": "draw what saves, restores and drains took, for Perfetto",
    "export": "write a checkpoint of any number of ranks as safetensors, as one torch file, or for torch.distributed",
    "diff": "in what two checkpoints or files differ, by structure or by values",
    "copy": "copy checkpoints into another directory or an object store, every byte verified",
    "doctor": "what this machine, and a directory of it, can do for checkpoints",
    "drain": "carry checkpoints from the disk of a node home, or from home to an object store",
}
_EXIT_CODES = """exit codes: 0 all is well; 1 the answer is "bad"; 2 wrong usage; 3 no such checkpoint; 4 in use by another job;
5 storage failed, or something is left over; 6 stale; 130 interrupted"""
_GOES_ON = ("drain",)  # what runs for long: it writes a log


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words and words[0] in COMMANDS else None
    parser, own_parser, module = _parser(name)
    chosen = parser.parse_args(words)
    as_json = getattr(chosen, "json", False)
    _set_up_logging(chosen.command)
    try:
        return _shown(module.run(chosen), chosen.command, as_json)
    except KeyboardInterrupt:
        return INTERRUPTED
    except UsageError as error:
        own_parser.error(str(error))
    except (CheckpointError, OSError, ValueError) as error:
        _complain(chosen.command, error)
        if as_json:
            said = {"error": {"type": type(error).__name__, "message": str(error)}}
            show(Answer(document=said), chosen.command, as_json)
        return _code_of(error)


def _parser(name: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, Any]:
    """That of all, which knows the arguments of one command; that of this command, and its module."""
    text = "What belongs to checkpoints, beside the training."
    parser = argparse.ArgumentParser(
        prog="ckpt", description=text, epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module, own_parser = None, parser
    for each, summary in COMMANDS.items():
        if each != name:
            commands.add_parser(each, help=summary)
            continue
        module = importlib.import_module(f"ckpt.cli.{each}")
        own_parser = one = commands.add_parser(
            each,
            help=summary,
            description=module.SUMMARY,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(one)
        text = "answer with one JSON document on standard output" + (", at the end" if each in _GOES_ON else "")
        one.add_argument("--json", action="store_true", help=text)
    return parser, own_parser, module


def _set_up_logging(command: str) -> None:
    if command in _GOES_ON:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    else:
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"ckpt {command}: %(message)s")


def _complain(command: str, error: Exception) -> None:
    if command in _GOES_ON:
        logging.getLogger("ckpt").error("%s", error)
    else:
        sys.stderr.write(f"ckpt {command}: {error}\n")


def _shown(answer: Answer | int, command: str, as_json: bool) -> int:
    if isinstance(answer, int):
        return answer
    show(answer, command, as_json)
    return answer.code


def _code_of(error: Exception) -> int:
    if isinstance(error, InUseError):
        return IN_USE
    if isinstance(error, (NotACheckpointError, FileNotFoundError)):
        return NONE
    return FAILED if isinstance(error, (StorageError, OSError)) else BAD
