"""Runs deepspeed_training.py on several ranks, and reads what they have found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nursery import nurseries_of_ranks
from support import patience

from dist.deepspeed_nursery import DeepSpeedNursery, free_port, training_program

TIMEOUT_S = patience(300.0)

Fields = dict[str, Any]


class Outcomes:
    """Of all cases of one plan, by name: for each rank what it has found. Each rank is a child of a nursery.

    Attributes:
        module: of dist, which knows the modes of the cases.
    """

    module = "deepspeed_training"

    def __init__(self, directory: Path, ranks: int, cases: list[Fields]) -> None:
        self.directory, self.ranks = directory, ranks
        self.log = ""
        left = cases
        while left:  # a case that takes the processes down takes no other case with it
            self._run(left)
            begun = [index for index, case in enumerate(left) if self._paths(case["name"])]
            left = left[max(begun, default=0) + 1 :]

    def _run(self, cases: list[Fields]) -> None:
        plan, port = {"outcomes": str(self.directory), "cases": cases}, free_port()
        with nurseries_of_ranks(self.ranks, DeepSpeedNursery) as nurseries:
            children = [
                nursery.start(training_program(plan, rank, self.ranks, port, self.module))
                for rank, nursery in enumerate(nurseries)
            ]
            for child in children:
                ended = child.wait(TIMEOUT_S)
                self.log += ended.stdout + ended.stderr

    def _paths(self, name: str) -> list[Path]:
        return [path for rank in range(self.ranks) if (path := self.directory / f"{name}.{rank}.json").exists()]

    def __getitem__(self, name: str) -> list[Fields]:
        outcomes = [json.loads(path.read_text()) for path in self._paths(name)]
        for outcome in outcomes:
            assert "error" not in outcome, outcome["traceback"]
        assert len(outcomes) == self.ranks, f"{name}: {len(outcomes)} of {self.ranks} ranks came to its end\n{self.log[-5000:]}"
        return outcomes


class LaunchedOutcomes(Outcomes):
    """The ranks are started by torchrun, as a user's are."""

    def _run(self, cases: list[Fields]) -> None:
        plan = self.directory / "plan.json"
        plan.write_text(json.dumps({"outcomes": str(self.directory), "cases": cases}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        ended = subprocess.run(
            [*torchrun, f"--nproc-per-node={self.ranks}", str(Path(__file__).with_name(f"{self.module}.py")), str(plan)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            env=environment(),
        )
        self.log += ended.stdout


def environment() -> dict[str, str]:
    """Collectives that miss a rank fail within a minute."""
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "1"}
