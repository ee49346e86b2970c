"""One training job by way of its node: its iterations while the drain is at work, and while it is stopped; prints JSON.

Both kinds are of one process, a few of each in turn: iterations of different processes, or of different minutes, differ by
more than a drain costs. The drain is stopped and let go on by signals, so that nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import statistics
import sys
from pathlib import Path

import psutil

import ckpt
from bench.measure.sampling import clock
from bench.workloads.training import Trainer
from ckpt.drain import journal as journals

WARM_UP = 8  # iterations: the drain's own median of an undisturbed one comes from them, too
BLOCK = 5  # iterations
BLOCKS = 6  # of each kind in a round, at most: until all is at home


def iterate(trainer: Trainer) -> float:
    began = clock()
    trainer.forward_backward()
    trainer.step()
    return clock() - began


def measure(trainer: Trainer, checkpointer: ckpt.Checkpointer, node: Path, rounds: int) -> list[dict[str, float]]:
    """For each round the mean iteration without and with the drain; how many of those with it, and the bytes a second that it
    has copied meanwhile. Those in which the save itself is on its way to the node are not counted.
    """
    for _ in range(WARM_UP):
        iterate(trainer)
    found = []
    for number in range(rounds):
        pending = checkpointer.save(number, trainer.state())
        while not pending.on_tier("node").done():
            iterate(trainer)
        found.append(measure_round(trainer, pending, node))
        pending.result()
    return found


def measure_round(trainer: Trainer, pending: ckpt.PendingSave, node: Path) -> dict[str, float]:
    """Blocks in the order ABBA: a drift of the machine meets both alike."""
    (root,) = node.iterdir()
    drain = drain_of(root)
    idle: list[float] = []
    beside: list[float] = []
    copied = 0.0
    for block in range(2 * BLOCKS):
        if beside and pending.done():
            break
        if stops := block % 4 in (1, 2):
            drain.send_signal(signal.SIGSTOP)
        before = delivered(root)
        try:
            (idle if stops else beside).extend(iterate(trainer) for _ in range(BLOCK))
        finally:
            drain.send_signal(signal.SIGCONT)
        copied += 0 if stops else delivered(root) - before
    if not idle:  # all was at home at once
        idle = [iterate(trainer) for _ in range(BLOCK)]
    return {
        "idle_s": statistics.mean(idle),
        "beside_s": statistics.mean(beside),
        "iterations": len(beside),
        "rate": copied / sum(beside),
    }


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
        print(json.dumps(measure(Trainer(args.bytes), checkpointer, args.node, args.rounds)))


if __name__ == "__main__":
    main()
