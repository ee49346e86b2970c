"""One rank of the benchmark of sharded states. Started by torchrun, with a file that says what to measure.

    torchrun --standalone --nproc-per-node 2 -m bench.sharded.rank PLAN.json

Rank 0 leaves what was measured in a file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.measure.ranks import Ranks
from bench.measure.sampling import Settings
from bench.sharded.loads import measure_loads
from bench.sharded.plan import LOADS, PLANNING, Plan
from bench.sharded.planning import measure_planning
from bench.sharded.saves import measure_saves


def run(plan: Plan) -> dict[str, Any]:
    settings = Settings(Path(plan.directory), rounds=plan.rounds, rest_s=plan.rest_s)
    if plan.part == PLANNING:
        return measure_planning(plan)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    measured = (measure_loads if plan.part == LOADS else measure_saves)(plan, ranks, settings)
    ranks.meet()
    dist.destroy_process_group()
    return measured


def main(path: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
    measured = run(plan)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(plan.results).write_text(json.dumps(measured | {"plan": dataclasses.asdict(plan)}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
