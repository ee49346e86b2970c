"""One training job by way of its node: its iterations while the drain is at work, and while it is not; prints JSON.

Both kinds are of one process, in turn: iterations of different processes differ by more than a drain costs.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from pathlib import Path

import ckpt
from bench.measure.sampling import clock
from bench.workloads.training import Trainer, bytes_of

WARM_UP = 8  # iterations: the drain's own median of an undisturbed one comes from them, too
IDLE = 12
MOST_BESIDE = 60


def iterate(trainer: Trainer) -> float:
    began = clock()
    trainer.forward_backward()
    trainer.step()
    return clock() - began


def measure(trainer: Trainer, checkpointer: ckpt.Checkpointer, rounds: int) -> list[dict[str, float]]:
    """For each round the mean iteration without and with the drain; what the drain's rate was.

    The iterations without are half before and half behind those with. Those in which the save itself is on its way to the node
    are not counted.
    """
    found = []
    for _ in range(WARM_UP):
        iterate(trainer)
    for number in range(rounds):
        before = [iterate(trainer) for _ in range(IDLE)]
        state = trainer.state()
        pending = checkpointer.save(number, state)
        on_node = pending.on_tier("node")
        while not on_node.done():
            iterate(trainer)
        began, beside = clock(), []
        while not pending.done() and len(beside) < MOST_BESIDE:
            beside.append(iterate(trainer))
        rate = bytes_of(state) / (clock() - began) if pending.done() else 0.0
        pending.result()
        behind = [iterate(trainer) for _ in range(IDLE)]
        idle = statistics.mean([*before, *behind])
        found.append({"idle_s": idle, "beside_s": statistics.mean(beside), "iterations": len(beside), "rate": rate})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    with ckpt.Checkpointer(args.home, keep=2, tiers=[ckpt.Tier.node(args.node)]) as checkpointer:
        print(json.dumps(measure(Trainer(args.bytes), checkpointer, args.rounds)))


if __name__ == "__main__":
    main()
