"""One training job that saves every few iterations, by one of several ways; prints what that has cost, as JSON.

A process of its own, because the limit on what is written at home is preloaded: see ../measure/rate_limit.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

import ckpt
from bench.measure.sampling import clock
from bench.workloads.training import Trainer, bytes_of
from ckpt.errors import SupersededError

WARM_UP = 1  # saves that are not counted: the first of them finds no arena, and no median of the training


def train(args: argparse.Namespace, trainer: Trainer, checkpointer: ckpt.Checkpointer | None) -> dict[str, Any]:
    iterations, blocked, pending = [], [], []
    counted_at = 0.0
    for iteration in range(args.iterations):
        began = clock()
        held_s = trainer.forward_backward() * 0.0  # only what follows holds the training up
        held_s += trainer.step()
        if checkpointer is not None and iteration % args.every == 0:
            asked = clock()
            pending.append(checkpointer.save(iteration, trainer.state()))
            held_s += clock() - asked
        if iteration == WARM_UP * args.every:
            counted_at = began
        iterations.append(clock() - began)
        blocked.append(held_s)
    counted = slice(WARM_UP * args.every, None)
    found: dict[str, Any] = {"total_s": clock() - counted_at, "iteration_s": statistics.median(iterations[counted])}
    if checkpointer is None:
        return found
    found["blocked_s"] = sum(blocked[counted]) / max(1, len(pending) - WARM_UP)
    ended = clock()
    errors = [each.exception() for each in pending]
    found["until_home_s"] = clock() - ended
    found["superseded"] = sum(isinstance(error, SupersededError) for error in errors)
    failed = [error for error in errors if error is not None and not isinstance(error, SupersededError)]
    if failed:
        raise failed[0]
    stats = [each.stats for each in pending[WARM_UP:]]
    durable = [each.tier_at.get("node", each.durable_at) - each.started_at for each in stats]
    found["durable_s"] = statistics.median(durable)
    found["fastest_durable_s"] = min(durable)
    found["bytes_saved"] = sum(each.bytes_total for each in stats) / len(stats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--save", choices=["nothing", "home", "node"], required=True)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    trainer = Trainer(args.bytes)
    nbytes = bytes_of(trainer.state())
    if args.save == "nothing":
        found = train(args, trainer, None)
    else:
        tiers = [ckpt.Tier.node(args.node)] if args.save == "node" else []
        with ckpt.Checkpointer(args.home, keep=2, tiers=tiers) as checkpointer:
            found = train(args, trainer, checkpointer)
    print(json.dumps(found | {"bytes": nbytes}))


if __name__ == "__main__":
    main()
