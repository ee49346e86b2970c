"""`ckpt copy SRC DST`"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ckpt.cli.answer import FAILED, OK, RED, Answer, count, paint, plain, size
from ckpt.cli.progress import Progress
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import read_latest
from ckpt.errors import CheckpointError, UnsupportedError
from ckpt.storage import durable
from ckpt.storage.object_urls import is_url
from ckpt.upkeep.copying import COPIED, Copied, copy, find_in_store, find_origins, move_latest
from ckpt.upkeep.repairing import alone_in

SUMMARY = """Copy a checkpoint, or all of a directory or an object store, into a directory. Every byte is verified on the
way. What is there already is not copied again, so that it may be called again after an interruption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint, a directory of some, or a URL as s3://bucket/run1")
    parser.add_argument("directory", metavar="DST", help="the directory that gets them")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: there is no checkpoint, or there is no place for it.
    """
    if is_url(chosen.directory):
        text = "an object store gets its checkpoints by a tier of the job, and by `ckpt drain`: copy to a directory"
        raise UnsupportedError(text)
    source, directory = Path(chosen.source), Path(chosen.directory)
    origins = find_in_store(chosen.source) if is_url(chosen.source) else find_origins(source)
    durable.make_directory(directory, durable=True)
    done: list[Copied] = []
    failure: CheckpointError | OSError | None = None
    total = sum(manifests.bytes_of(origin.manifest) for origin in origins)
    with alone_in(directory, changing=True), Progress("copied", total) as told:
        try:
            for each in copy(origins, directory, told):
                done.append(each)  # one by one: those before an error count
        except (CheckpointError, OSError) as error:
            failure = error
        if done:
            move_latest(directory, None if is_url(chosen.source) else read_latest(source))
    left = len(origins) - len(done)
    document = {
        **{"source": chosen.source, "directory": chosen.directory, "left": left},
        "checkpoints": [{**dataclasses.asdict(each), "target": str(each.target)} for each in done],
    }
    if failure is not None:
        document["error"] = {"type": type(failure).__name__, "message": str(failure)}
    lines = [f"{each.state} {plain(str(each.target))}, {size(each.bytes)}" for each in done]
    lines += [paint(f"failed: {plain(str(failure))}", RED)] * (failure is not None)
    copied = [each for each in done if each.state == COPIED]
    lines.append(f"{count(len(copied), 'checkpoint')} of {size(sum(each.bytes for each in copied))} copied, {left} left over")
    return Answer(FAILED if failure is not None else OK, document, lines)
