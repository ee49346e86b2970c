"""Real saves for a simulation to be held against: a training that only sleeps, saved every iteration.

python -m bench.simulation.real_saves plan.json     writes what it has measured to the path in the plan
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ckpt
from bench.measure.sampling import clock
from bench.workloads.training import BYTES_PER_PARAMETER, bytes_of, state_of

COPIES = 5


def copy_rate(nbytes: int) -> float:
    """Bytes per second of one thread from memory to touched memory."""
    torch.set_num_threads(1)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(COPIES):
        started = clock()
        target.copy_(source)
        seconds.append(clock() - started)
    return nbytes / statistics.median(seconds)


def run_case(directory: Path, state: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Iterations of save(), a sleep, a fence; the first save, which touches the arena, is not among them."""
    options = ckpt.Options(arena_bytes=case["arena_bytes"])
    with ckpt.Checkpointer(directory, keep=2, options=options, coordinator="local") as checkpointer:
        checkpointer.save(0, state, lazy=True).result()
        started = clock()
        rows, pendings = [], []
        for step in range(1, case["iterations"] + 1):
            began = clock()
            pendings.append(checkpointer.save(step, state, lazy=True))
            save_s = clock() - began
            time.sleep(case["compute_s"])
            reached = clock()
            ckpt.fence()
            rows.append({"save_s": save_s, "fence_s": clock() - reached})
        trained_s = clock() - started
        checkpointer.wait()
        ended_s = clock() - started
    for row, pending in zip(rows, pendings, strict=True):
        stats = pending.stats
        assert stats.started_at is not None and stats.flushed_at is not None and stats.durable_at is not None
        row |= {"flush_s": stats.flushed_at - stats.started_at, "commit_s": stats.durable_at - stats.flushed_at}
    return {"trained_s": trained_s, "ended_s": ended_s, "saves": rows, "file_bytes": pendings[-1].stats.bytes_total}


def main(plan: dict[str, Any]) -> None:
    torch.manual_seed(0)
    state = state_of(plan["state_bytes"] // BYTES_PER_PARAMETER)
    found = {
        "nbytes": bytes_of(state),
        "copy_rate": copy_rate(plan["state_bytes"]),
        "cases": [run_case(Path(plan["directory"]) / str(at), state, case) for at, case in enumerate(plan["cases"])],
    }
    Path(plan["results"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
