"""A job of the Trainer is killed with SIGKILL and resumed: it ends in the very same weights. On one rank, and on two."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from dist.deepspeed_nursery import free_port
from dist.trainer_nursery import TrainerNursery, training_program
from nursery import Child, Nursery, nurseries_of_ranks
from support import wait_until

STEPS = 8
Steps = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2, TrainerNursery) as made:
        yield made


class Job:
    """So many ranks that train in one directory, again and again."""

    def __init__(self, nurseries: list[Nursery], where: Path, ranks: int) -> None:
        self._nurseries, self._where, self._ranks = nurseries[:ranks], where, ranks
        self._lives = 0
        self.saved = where / "saved"

    def start(self, **plan: Any) -> list[Child]:
        self._lives += 1
        whole = {"directory": str(self.saved), "log": str(self._where / f"life-{self._lives}"), **plan}
        port = free_port() if self._ranks > 1 else 0
        programs = [training_program(whole, rank, self._ranks, port) for rank in range(self._ranks)]
        return [nursery.start(program) for nursery, program in zip(self._nurseries, programs, strict=True)]

    def end(self, children: list[Child]) -> list[Steps]:
        """What each rank has logged, by step."""
        for ended in [child.wait() for child in children]:
            assert ended.returncode == 0, ended.stderr
        return self.logged()

    def logged(self) -> list[Steps]:
        logs = [self._where / f"life-{self._lives}.{rank}" for rank in range(self._ranks)]
        lines = [log.read_text().splitlines(keepends=True) if log.exists() else [] for log in logs]
        records = [[json.loads(line) for line in each if line.endswith("\n")] for each in lines]
        return [{record["step"]: record for record in each} for each in records]

    def kill_once_saved(self, step: int, **plan: Any) -> list[Steps]:
        """All ranks at once, when a checkpoint has its name."""
        children = self.start(**plan)
        try:
            wait_until(lambda: (self.saved / f"checkpoint-{step}").exists() or children[0].ends_within(0), what="a checkpoint")
        finally:
            for child in children:
                child.signal(signal.SIGKILL)
            ended = [child.wait() for child in children]
        assert {each.returncode for each in ended} <= {-signal.SIGKILL, 0}, ended
        return self.logged()


def killed_and_resumed(nurseries: list[Nursery], tmp_path: Path, ranks: int, **how: Any) -> Path:
    """Gives the directory of the checkpoints, once all is compared."""
    reference = Job(nurseries, tmp_path / "undisturbed", ranks)
    reference.saved.mkdir(parents=True)
    undisturbed = reference.end(reference.start(stock=True, arguments={"save_strategy": "no"}, **how))
    assert all(len(each) == STEPS for each in undisturbed)

    job = Job(nurseries, tmp_path / "killed", ranks)
    job.saved.mkdir(parents=True)
    logs = job.kill_once_saved(3, **how)
    assert {path.name for path in job.saved.iterdir() if not path.name.startswith(".")} <= {
        f"checkpoint-{step}" for step in range(1, STEPS + 1)
    }
    resumed = job.end(job.start(resume=True, **how))
    for rank in range(ranks):
        assert len(resumed[rank]) <= STEPS - 3 and (not resumed[rank] or max(resumed[rank]) == STEPS)
        assert {step: undisturbed[rank][step] for step in logs[rank] | resumed[rank]} == logs[rank] | resumed[rank]
    again = Job(nurseries, tmp_path / "killed", ranks)  # by the Trainer of transformers itself, from the last but one
    again._lives = 2
    last = again.end(again.start(resume=str(job.saved / f"checkpoint-{STEPS - 1}"), stock=True, **how))
    assert last == [{STEPS: undisturbed[rank][STEPS]} for rank in range(ranks)]
    return job.saved


def listed(checkpoint: Path) -> set[str]:
    return {entry["name"] for entry in json.loads((checkpoint / "manifest.json").read_text())["files"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_ends_in_the_same_state(ranks: int, nurseries: list[Nursery], tmp_path: Path) -> None:
    saved = killed_and_resumed(nurseries, tmp_path, ranks)
    states = {"rng_state.pth"} if ranks == 1 else {"rng_state_0.pth", "rng_state_1.pth"}
    assert {"optimizer.pt", "scheduler.pt", "training_args.bin"} | states <= listed(saved / f"checkpoint-{STEPS}")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_same_with_deepspeed(stage: int, nurseries: list[Nursery], tmp_path: Path) -> None:
    saved = killed_and_resumed(nurseries, tmp_path, 2, stage=stage)
    newest = saved / f"checkpoint-{STEPS}"
    states = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)}
    assert (newest / "latest").read_text() == f"global_step{STEPS}" and listed(newest / f"global_step{STEPS}") >= states
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= listed(newest)


@pytest.mark.slow
def test_the_same_with_fsdp(nurseries: list[Nursery], tmp_path: Path) -> None:
    saved = killed_and_resumed(nurseries, tmp_path, 2, fsdp="SHARDED_STATE_DICT")
    newest = saved / f"checkpoint-{STEPS}"
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert listed(newest / part) >= {"__0_0.distcp", "__1_0.distcp"}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_with_an_adapter_of_peft(ranks: int, nurseries: list[Nursery], tmp_path: Path) -> None:
    saved = killed_and_resumed(nurseries, tmp_path, ranks, lora=True)
    newest = saved / f"checkpoint-{STEPS}"
    assert {"adapter_model.safetensors", "optimizer.pt"} <= listed(newest) and (newest / "adapter_config.json").exists()
    assert not (newest / "model.safetensors").exists()
