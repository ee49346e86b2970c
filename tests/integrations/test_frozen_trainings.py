"""Two ranks train what is frozen in part, on a file system that shares blocks: what is frozen is written twice and no more, and
what is resumed goes on bit for bit. (LoRA is in test_peft.py.)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from mounting import MIB
from nursery import Nursery, free_port, nurseries_of_ranks, sharding_nurseries
from reuse_runs import sharing  # noqa: F401  a fixture
from support import patience

STEPS, MIDDLE = 6, 4
FROZEN = 8 * MIB  # of dist/frozen_trainings.py, on both ranks together


def run(nurseries: list[Nursery], **request: Any) -> list[list[list[str]]]:
    """What each rank has said, in words."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank, nursery in enumerate(nurseries):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment = place | {name: str(number) for name, number in numbers.items()}
        request["environment"] = environment
        children.append(nursery.start(f"from dist import frozen_trainings; frozen_trainings.main({request!r})"))
    ended = [child.wait(patience(300)) for child in children]
    for each in ended:
        assert each.returncode == 0, each.stdout + each.stderr
    return [[line.split() for line in each.stdout.splitlines()] for each in ended]


def check(ranks: list[list[list[str]]]) -> None:
    reused = [0] * (STEPS + 1)
    for said in ranks:
        saved = {int(words[1]): words for words in said if words[0] == "saved"}
        (resumed,) = [words for words in said if words[0] == "resumed"]
        (ended,) = [words for words in said if words[0] == "ended"]
        assert resumed[1:] == [str(MIDDLE), saved[MIDDLE][3]]
        assert ended[1] == saved[STEPS][3] != resumed[2]
        for step, words in saved.items():
            reused[step] += int(words[2])
    assert reused[1:3] == [0, 0] and all(FROZEN * 0.9 < each < FROZEN * 1.1 for each in reused[3:]), reused


@pytest.mark.slow
def test_fsdp(sharing: Path, tmp_path: Path) -> None:  # noqa: F811
    with sharding_nurseries(2) as nurseries:
        check(run(nurseries, directory=str(sharing / "run"), meeting=str(tmp_path / "meeting")))


@pytest.fixture(scope="module")
def deepspeed_nurseries() -> Iterator[list[Nursery]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    from dist.deepspeed_nursery import DeepSpeedNursery

    with nurseries_of_ranks(2, DeepSpeedNursery) as nurseries:
        yield nurseries


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed(sharing: Path, deepspeed_nurseries: list[Nursery], stage: int) -> None:  # noqa: F811
    check(run(deepspeed_nurseries, directory=str(sharing / "run"), stage=stage))
