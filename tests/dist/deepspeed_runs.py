"""Starts deepspeed_training.py under torchrun and reads what its ranks have found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import patience

SCRIPT = Path(__file__).with_name("deepspeed_training.py")
TIMEOUT_S = patience(300.0)

Fields = dict[str, Any]


class Outcomes:
    """Of all cases of one plan, by name: for each rank what it has found."""

    script = SCRIPT

    def __init__(self, directory: Path, ranks: int, cases: list[Fields]) -> None:
        self.directory, self.ranks = directory, ranks
        self.log = ""
        left = cases
        while left:  # a case that takes the processes down takes no other case with it
            self._run(left)
            begun = [index for index, case in enumerate(left) if self._paths(case["name"])]
            left = left[max(begun, default=0) + 1 :]

    def _run(self, cases: list[Fields]) -> None:
        plan = self.directory / "plan.json"
        plan.write_text(json.dumps({"outcomes": str(self.directory), "cases": cases}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        ended = subprocess.run(
            [*torchrun, f"--nproc-per-node={self.ranks}", str(self.script), str(plan)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            env=environment(),
        )
        self.log += ended.stdout

    def _paths(self, name: str) -> list[Path]:
        return [path for rank in range(self.ranks) if (path := self.directory / f"{name}.{rank}.json").exists()]

    def __getitem__(self, name: str) -> list[Fields]:
        outcomes = [json.loads(path.read_text()) for path in self._paths(name)]
        for outcome in outcomes:
            assert "error" not in outcome, outcome["traceback"]
        assert len(outcomes) == self.ranks, f"{name}: {len(outcomes)} of {self.ranks} ranks came to its end\n{self.log[-5000:]}"
        return outcomes


def environment() -> dict[str, str]:
    """Collectives that miss a rank fail within a minute."""
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "1"}
