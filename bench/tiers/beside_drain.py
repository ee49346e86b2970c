"""One training job by way of its node: its iterations while the drain is at work, while it is stopped, and while dd copies the
same files instead; prints JSON.

All are of one process, a few of each kind in turn: iterations of different processes, or of different minutes, differ by more
than a drain costs. The drain is stopped and let go on by signals, so that nothing else differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

import ckpt
from bench.measure.sampling import clock
from bench.workloads.training import Trainer
from ckpt.drain import journal as journals

WARM_UP = 8  # iterations: the drain's own median of an undisturbed one comes from them, too
BLOCK = 5  # iterations
BLOCKS = 4  # of each kind in a round
DRAIN, IDLE, COPY = KINDS = ("drain", "idle", "copy")


def iterate(trainer: Trainer) -> float:
    began = clock()
    trainer.forward_backward()
    trainer.step()
    return clock() - began


def measure(trainer: Trainer, checkpointer: ckpt.Checkpointer, node: Path, home: Path, rounds: int) -> list[dict[str, float]]:
    """For each round the mean iteration of each kind; how many of those beside the drain, and the bytes a second that it has
    copied meanwhile. Those in which the save itself is on its way to the node are not counted.
    """
    for _ in range(WARM_UP):
        iterate(trainer)
    found = []
    for number in range(rounds):
        pending = checkpointer.save(number, trainer.state())
        while not pending.on_tier("node").done():
            iterate(trainer)
        found.append(measure_round(trainer, pending, node, home))
        pending.result()
    return found


def measure_round(trainer: Trainer, pending: ckpt.PendingSave, node: Path, home: Path) -> dict[str, float]:
    """Blocks of each kind in turn, then backwards: a drift of the machine meets all alike."""
    (root,) = node.iterdir()
    drain = drain_of(root)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    copied = 0.0
    for block in range(BLOCKS * len(KINDS)):
        turn, place = divmod(block, len(KINDS))
        kind = KINDS[place if turn % 2 == 0 else -1 - place]
        if seconds[DRAIN] and pending.done() and kind == DRAIN:
            continue
        before = delivered(root)
        with stopped(drain, kind != DRAIN), plain_copy(root, home, kind == COPY):
            seconds[kind] += [iterate(trainer) for _ in range(BLOCK)]
        copied += delivered(root) - before if kind == DRAIN else 0
    means = {kind: statistics.mean(found) for kind, found in seconds.items()}
    return means | {"iterations": len(seconds[DRAIN]), "rate": copied / sum(seconds[DRAIN])}


@contextlib.contextmanager
def stopped(drain: psutil.Process, stops: bool) -> Iterator[None]:
    if stops:
        drain.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        drain.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def plain_copy(root: Path, home: Path, copies: bool) -> Iterator[None]:
    """dd does what no drain can do without: it reads the bytes and writes them, past the page cache, at the lowest priority."""
    if not copies:
        yield
        return
    source = max(root.rglob("*.pt"), key=lambda path: path.stat().st_size)
    target = home / "copied.bin"
    command = ["nice", "-n", "19", "dd", f"if={source}", f"of={target}", "bs=8M", "iflag=direct", "oflag=direct"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()
    target.unlink(missing_ok=True)


def drain_of(root: Path) -> psutil.Process:
    """The process that carries home what lies there."""
    (found,) = [each for each in psutil.process_iter() if is_drain(each, root)]
    return found


def is_drain(process: psutil.Process, root: Path) -> bool:
    try:
        return process.cmdline()[-2:] == ["drain", str(root)]
    except psutil.Error:  # it has just ended, or is another user's
        return False


def delivered(root: Path) -> int:
    return sum(file.done for each in journals.read_all(root) for file in each.files.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    with ckpt.Checkpointer(args.home, keep=2, tiers=[ckpt.Tier.node(args.node)]) as checkpointer:
        print(json.dumps(measure(Trainer(args.bytes), checkpointer, args.node, args.home, args.rounds)))


if __name__ == "__main__":
    main()
