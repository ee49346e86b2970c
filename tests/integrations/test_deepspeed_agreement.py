"""Ranks that do not save the same: replicas become one checkpoint; what cannot become one is refused by all ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from dist.deepspeed_runs import Fields, Outcomes

pytestmark = pytest.mark.usefixtures("native")

WHAT = {  # and what is said of it
    "tags WARN": "rank 1 saves 'of-1' where rank 0 saves 'of-0'",
    "tags IGNORE": "rank 1 saves 'of-1' where rank 0 saves 'of-0'",
    "tags FAIL": "rank 1 saves 'of-1' where rank 0 saves 'of-0'",
    "directories WARN": "a checkpoint of all ranks has one directory",
}


def case(mode: str, name: str, **fields: Any) -> Fields:
    common = {"engine": "enable", "precision": "bf16", "same_buffers": True, "stage": 1}
    return common | {"name": f"{mode} {name}".strip(), "mode": mode} | fields


CASES = [
    *(case("differing", what, tags=what.split(), stage=1 if "WARN" in what else 3) for what in WHAT),
    case("exported", ""),
]


class Agreement(Outcomes):
    module = "deepspeed_agreement"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Agreement(tmp_path_factory.mktemp("agreement"), 2, CASES)


@pytest.mark.parametrize("what", WHAT)
def test_what_differs_between_ranks_is_refused_by_all_of_them(what: str, ranks: Outcomes) -> None:
    for found in ranks[f"differing {what}"]:
        for refused in found["refused"]:
            assert refused is not None, "save_checkpoint() has returned as if all were well"
            assert refused["type"] == "CheckpointError" and WHAT[what] in refused["text"]
        assert (found["wait"], found["latest"], found["leftovers"]) == (None, "after", [])
        assert found["loads"] == {"error": None, "path": "after", "same": True, "logged": []}


def test_the_directories_of_ranks_that_write_nothing_do_not_count(ranks: Outcomes) -> None:
    first, second = ranks["exported"]
    assert (first["raised"], second["raised"]) == (None, None)
    assert (first["files"], second["files"]) == (["pytorch_model.bin"], [])


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Agreement(tmp_path_factory.mktemp("replicas"), 4, [case("folded", str(stage), stage=stage) for stage in (0, 1)])


@pytest.mark.parametrize("stage", [0, 1])
def test_replicas_of_experts_that_all_write_become_one_checkpoint(stage: int, replicas: Outcomes) -> None:
    """Expert parallelism folded into tensor parallelism."""
    for found in replicas[f"folded {stage}"]:
        assert (found["saved"], found["wait"]) == (True, None)
        assert (found["differences"], found["leftovers"]) == ([], [])
        assert (found["files"], found["ranks"]) == (4, [0, 1]), "as by DeepSpeed's own engine; of the lowest ranks"
        assert (found["loads"], found["same"]) == (True, True)
