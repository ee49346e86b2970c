"""Two ranks on two "nodes", directories of one machine, get their checkpoint back; rank 0 writes what that took, as JSON.

local        each rank reads its own file by ckpt.load(): what a local read takes
nodes        restore(), both nodes as they were
node lost    restore(), after the disk of node 1 was exchanged for an empty one: its files come from home
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import ckpt
from bench.measure.ranks import Ranks
from bench.measure.sampling import Settings, Side, Values, clock, interleave

LOCAL, NODES, LOST = "local read", "both nodes", "one node lost"
TENSORS = 64


def forget(directory: Path) -> None:
    """Asks the page cache to."""
    for path in directory.rglob("*.pt"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def emptied(directory: Path, really: bool) -> Iterator[None]:
    aside = directory.with_name(f"{directory.name}-aside")
    if really:
        directory.rename(aside)
    yield
    if really:
        for path in sorted(directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if directory.exists():
            directory.rmdir()
        aside.rename(directory)


def together(ranks: Ranks, measure: Callable[[], float]) -> Values:
    ranks.meet()
    return {"restore_s": max(ranks.gather(measure()))}


def read_own(file: Path) -> float:
    forget(file.parent)
    began = clock()
    ckpt.load(file)
    return clock() - began


def restore(home: Path, node: Path, loses: bool, expected: dict[str, torch.Tensor]) -> float:
    with emptied(node, loses):
        forget(home), forget(node)
        dist.barrier()
        with ckpt.Checkpointer(home, tiers=[ckpt.Tier.node(node)]) as checkpointer:
            began = clock()
            found = checkpointer.restore()
            seconds = clock() - began
        dist.barrier()
    if found is None or not all(torch.equal(found.state[name], tensor) for name, tensor in expected.items()):
        raise RuntimeError("what was restored is not what was saved")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--bytes", type=int, required=True, help="of each rank")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    home, node = args.directory / "home", args.directory / f"node{ranks.rank}"
    torch.manual_seed(ranks.rank)
    state = {f"tensor{number}": torch.randn(args.bytes // TENSORS // 4) for number in range(TENSORS)}
    with ckpt.Checkpointer(home, tiers=[ckpt.Tier.node(node)]) as checkpointer:
        checkpointer.save(1, state).result()
    (file,) = node.rglob(f"rank-{ranks.rank:05d}*.pt")
    sides = [
        Side(LOCAL, lambda: together(ranks, partial(read_own, file))),
        Side(NODES, lambda: together(ranks, partial(restore, home, node, False, state))),
        Side(LOST, lambda: together(ranks, partial(restore, home, node, ranks.rank == 1, state))),
    ]

    def settle() -> None:
        Settings(args.directory).settle()
        ranks.meet()

    samples = interleave(sides, args.rounds, settle)
    if ranks.rank == 0:
        args.out.write_text(json.dumps({name: [s.values["restore_s"] for s in found] for name, found in samples.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
