"""`ckpt export PATH -o OUT --format safetensors|pt|dcp`"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from ckpt.cli.answer import OK, Answer, UsageError, count, plain, size
from ckpt.cli.progress import Progress
from ckpt.quantities import parse_size
from ckpt.upkeep.targets import resolve

SUMMARY = """Write a checkpoint of any number of ranks anew: as safetensors, for inference, as one torch file, or as a directory
of torch.distributed.checkpoint. Tensors are verified, read and written one by one."""
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH[:FILE]", help="a checkpoint, the newest of a directory, or a file")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="the file; a directory with --shard-size, and for dcp"
    )
    parser.add_argument("--format", choices=("safetensors", "pt", "dcp"), required=True)
    parser.add_argument("--dtype", choices=_DTYPES, help="of tensors of floating point numbers; else as they are")
    text = "not for pt: several files of about this size, as in 5GB; for safetensors with an index"
    parser.add_argument("--shard-size", type=_size, metavar="SIZE", help=text)
    text = "only what matches one of these, as 'model.*'; may be given several times"
    parser.add_argument("--keys", action="append", default=[], metavar="GLOB", help=text)
    parser.add_argument(
        "--strip", default="", metavar="PREFIX", help="leave this out at the beginning of names, as in 'model.'"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="with what this rank has saved for itself")


def _size(text: str) -> int:
    try:
        found = parse_size(text, "the size")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if found < 1:
        raise argparse.ArgumentTypeError("the size must be more than 0")
    return found


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it cannot be written so.
        UsageError: the options do not go together, or --strip takes nothing off.
    """
    if chosen.format == "pt" and chosen.shard_size is not None:
        raise UsageError("--shard-size is for safetensors and dcp: a torch file is one")
    import torch  # what follows needs it

    from ckpt.conversion import exporting
    from ckpt.conversion.dcp_directory import write_dcp
    from ckpt.conversion.opening import open_source

    path, file = resolve(chosen.path)
    wanted = exporting.Chosen(
        open_source(path, file, chosen.rank),
        chosen.keys,
        None if chosen.dtype is None else getattr(torch, chosen.dtype),
        chosen.strip,
    )
    _expect_prefix(chosen.strip, wanted.names)
    total = sum(entry.nbytes for entry in wanted.tensors.values())
    with Progress("exported", total) as told:
        if chosen.format == "pt":
            made = exporting.write_torch(wanted, chosen.output, told)
        elif chosen.format == "dcp":
            made = write_dcp(wanted, chosen.output, chosen.shard_size, told)
        else:
            made = exporting.write_safetensors(wanted, chosen.output, chosen.shard_size, told)
    document = {
        **{"source": str(path), "files": [str(each) for each in made.files], "tensors": made.tensors, "bytes": made.bytes},
        "left_out": made.left_out,
    }
    lines = [f"{plain(str(each))}" for each in made.files]
    lines.append(f"{count(made.tensors, 'tensor')}, {size(made.bytes)}")
    if made.left_out:
        names = ", ".join(made.left_out[:8]) + (", ..." if len(made.left_out) > 8 else "")
        lines.append(f"{count(len(made.left_out), 'value')} left out, which safetensors cannot hold: {plain(names)}")
    return Answer(OK, document, lines)


def _expect_prefix(prefix: str, names: Sequence[str]) -> None:
    """Of what is to be written, something must begin with it: else it is mistyped, and nobody would notice."""
    if any(name.startswith(prefix) for name in names):
        return
    beginnings: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        beginnings |= dict.fromkeys(".".join(parts[:length]) + "." for length in range(1, len(parts)))
    close = difflib.get_close_matches(prefix, beginnings, 1)
    there = f"did you mean '{close[0]}'?" if close else f"the first names are {list(names[:8])}"
    raise UsageError(f"--strip: no name that is to be written begins with '{prefix}': {plain(there)}")
