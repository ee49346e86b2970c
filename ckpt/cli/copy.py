"""`ckpt copy SRC DST`"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ckpt.cli.answer import FAILED, OK, RED, Answer, count, paint, plain, size
from ckpt.cli.progress import Progress
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import read_latest
from ckpt.drain.stopping import Stop, StoppedError
from ckpt.errors import CheckpointError, UnsupportedError
from ckpt.storage import durable
from ckpt.storage.object_urls import is_url
from ckpt.upkeep.copying import COPIED, Copied, copy, find_in_store, find_origins, move_latest
from ckpt.upkeep.repairing import alone_in
from ckpt.upkeep.uploading import StorePlace, find_generations, told_to_stop

SUMMARY = """Copy a checkpoint, or all of a directory or an object store, into a directory or an object store. Every byte is
verified on the way. What is there already is not copied again, so that it may be called again after an interruption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint, a directory of some, or a URL as s3://bucket/run1")
    parser.add_argument("target", metavar="DST", help="the directory, or the URL, that gets them")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: there is no checkpoint, or there is no place for it.
    """
    work = _Work()
    if not is_url(chosen.target):
        _copy_here(chosen.source, Path(chosen.target), work)
    elif is_url(chosen.source):
        raise UnsupportedError("from one object store to another goes by way of a directory: copy there first")
    else:
        _copy_to_store(Path(chosen.source), chosen.target, work)
    return work.answer(chosen)


class _Work:
    """What is copied, and the error that ended it. Those before an error count."""

    def __init__(self) -> None:
        self.wanted = 0
        self._done: list[Copied] = []
        self._failure: CheckpointError | OSError | None = None

    def follow(self, copied: Iterator[Copied]) -> None:
        try:
            for each in copied:
                self._done.append(each)
        except StoppedError:
            raise KeyboardInterrupt from None
        except (CheckpointError, OSError) as error:
            self._failure = error

    @property
    def has_any(self) -> bool:
        return bool(self._done)

    def answer(self, chosen: argparse.Namespace) -> Answer:
        done, failure, left = self._done, self._failure, self.wanted - len(self._done)
        document = {
            **{"source": chosen.source, "directory": chosen.target, "left": left},
            "checkpoints": [dataclasses.asdict(each) for each in done],
        }
        if failure is not None:
            document["error"] = {"type": type(failure).__name__, "message": str(failure)}
        lines = [f"{each.state} {plain(each.target)}, {size(each.bytes)}" for each in done]
        lines += [paint(f"failed: {plain(str(failure))}", RED)] * (failure is not None)
        copied = [each for each in done if each.state == COPIED]
        total = size(sum(each.bytes for each in copied))
        lines.append(f"{count(len(copied), 'checkpoint')} of {total} copied, {left} left over")
        return Answer(FAILED if failure is not None else OK, document, lines)


def _copy_here(text: str, directory: Path, work: _Work) -> None:
    source = Path(text)
    origins = find_in_store(text) if is_url(text) else find_origins(source)
    work.wanted = len(origins)
    durable.make_directory(directory, durable=True)
    total = sum(manifests.bytes_of(origin.manifest) for origin in origins)
    with alone_in(directory, changing=True), Progress("copied", total) as told:
        work.follow(copy(origins, directory, told))
        if work.has_any:
            move_latest(directory, None if is_url(text) else read_latest(source))


def _copy_to_store(source: Path, url: str, work: _Work) -> None:
    home, generations = find_generations(source)
    work.wanted = len(generations)
    total = sum(manifests.bytes_of(each.manifest) for each in generations)
    stop = Stop()
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(StorePlace(home, url, stop))
        stack.enter_context(told_to_stop(stop))
        work.follow(place.copy(generations, stack.enter_context(Progress("copied", total))))
