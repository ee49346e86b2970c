"""Every file that DeepSpeed saves through our engine holds, value by value, what DeepSpeed's own engine writes at that moment.

Training goes on while slow storage takes the files, and changes all that a checkpoint holds.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import patience
from tier_places import end_drains_below

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from dist.deepspeed_runs import Fields, LaunchedOutcomes, Outcomes, environment

pytestmark = pytest.mark.usefixtures("native")

# Long enough that no file can be in place when save_checkpoint() returns, nor all of it written when training goes on.
SLOW = [{"call": "fallocate", "delay_s": 0.1}, {"call": "pwritev", "delay_s": 0.003}]
BUILD_S = patience(300.0)  # what takes a minute
VERY_SLOW = [{"call": "fallocate", "delay_s": 3.0}]

# What DeepSpeed 0.19 refuses, so that it is not here: MoE with ZeRO 3 ("Native DeepSpeed MoE is not supported with ZeRO Stage
# 3") and pipelines with ZeRO 2 and 3 ("ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism").
KINDS: list[Fields] = [
    *({"stage": 0, "precision": precision} for precision in ("fp32", "bf16", "fp16")),
    {"stage": 1, "precision": "bf16"},
    {"stage": 2, "precision": "fp16"},
    *({"stage": 3, "precision": precision} for precision in ("fp32", "bf16")),
    *({"variant": "moe", "stage": stage, "precision": "bf16", "expert_ranks": 1} for stage in (0, 2)),
    {"variant": "moe", "stage": 1, "precision": "fp32", "expert_ranks": 2},
    {"variant": "pipeline", "stage": 0, "precision": "fp32"},
    # DeepSpeed's BF16_Optimizer saves, and fails to load from, stages of a pipeline: KeyError in _load_legacy_checkpoint.
    {"variant": "pipeline", "stage": 0, "precision": "bf16", "reload": False},
    {"variant": "pipeline", "stage": 1, "precision": "bf16"},
    {"variant": "pipeline", "stage": 1, "precision": "fp16", "tied": True},
    *({"stage": stage, "precision": "bf16", "offload": True} for stage in (2, 3)),
    *({"stage": stage, "precision": "bf16", "frozen": True} for stage in (1, 3)),
    *({"stage": stage, "precision": "bf16", "frozen": True, "exclude_frozen": True, "reload": False} for stage in (0, 3)),
    *({"stage": stage, "precision": "bf16", "tied": True} for stage in (1, 3)),
    *({"stage": stage, "precision": "bf16", "restless": True} for stage in (0, 2)),
]
# The same in other stages and precisions.
MORE_KINDS: list[Fields] = [
    *({"stage": stage, "precision": precision} for stage, precision in ((1, "fp32"), (1, "fp16"), (2, "fp32"), (2, "bf16"))),
    {"stage": 3, "precision": "fp16"},
    {"variant": "moe", "stage": 1, "precision": "bf16", "expert_ranks": 1},
    *({"variant": "moe", "stage": stage, "precision": "fp32", "expert_ranks": 2} for stage in (0, 2)),
    {"stage": 1, "precision": "bf16", "offload": True},
    {"variant": "moe", "stage": 2, "precision": "bf16", "offload": True},
    *({"stage": stage, "precision": "bf16", "frozen": True} for stage in (0, 2)),
    *({"stage": stage, "precision": "bf16", "frozen": True, "exclude_frozen": True, "reload": False} for stage in (1, 2)),
    *({"stage": stage, "precision": "bf16", "tied": True} for stage in (0, 2)),
    {"stage": 1, "precision": "bf16", "restless": True},
]
# Ways of saving, each with a few kinds: between two backward passes, twice without a step between, a tag again, 16-bit weights.
WAYS: list[Fields] = [
    {"stage": stage, "precision": "bf16"} | way
    for stage in (1, 3)
    for way in ({"in_the_middle": True}, {"between": 0}, {"tags": ["same", "same"]}, {"half": True})
]
# Of these the files of all engines are compared with one another.
TREES: list[Fields] = [
    *({"stage": stage, "precision": "bf16", "half": True} for stage in range(4)),
    {"variant": "moe", "stage": 2, "precision": "fp32", "expert_ranks": 2},
    {"variant": "pipeline", "stage": 1, "precision": "bf16", "tied": True},
    {"stage": 2, "precision": "fp32", "offload": True, "frozen": True},
]
ATTACHED = TREES[:1] + TREES[3:6]  # the engine is put on one that is there
BY_NODES = TREES[3:6]  # and what comes home by way of the disk of a node is the same
OWN_ADAM: list[Fields] = [
    {"stage": stage, "precision": "bf16", "own_adam": True} | more for stage in (1, 2, 3) for more in ({}, {"offload": True})
]
ALONE: list[Fields] = [
    *({"stage": stage, "precision": "bf16"} for stage in range(4)),
    {"variant": "moe", "stage": 1, "precision": "fp32"},
    {"variant": "pipeline", "stage": 1, "precision": "fp32"},
]


def name_of(case: Fields) -> str:
    """Without the brackets of a list: DeepSpeed finds no file in a directory with those in its name."""
    words = []
    for name, value in case.items():
        text = "+".join(value) if isinstance(value, list) else str(value)
        words.append(text if name in ("variant", "precision") else name if value is True else f"{name}={text}")
    return " ".join(words)


def files(engine: str, case: Fields, **more: Any) -> Fields:
    faults = [] if engine == "stock" else SLOW
    return {"name": f"{engine} {name_of(case)}", "mode": "files", "engine": engine, "faults": faults} | case | more


def trees(engine: str, case: Fields) -> Fields:
    like = "" if engine == "stock" else f"tree stock {name_of(case)}"
    return {"name": f"tree {engine} {name_of(case)}", "mode": "tree", "engine": engine, "like": like} | case


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    cases = [files("stock", case) for case in KINDS[:1]] + [trees("stock", case) for case in TREES]
    cases += [trees("attach", case) for case in ATTACHED]
    cases += [files("attach", case, faults=VERY_SLOW) for case in KINDS[:1]]
    cases += [trees("enable", case) for case in TREES]  # what is enabled stays so
    cases += [files("enable", case) for case in KINDS + WAYS]
    where = tmp_path_factory.mktemp("two")
    tiers = {"tiers": [{"node": str(where / "node-0")}]}
    cases += [trees("enable", case) | {"name": f"tree nodes {name_of(case)}", "options": tiers} for case in BY_NODES]
    yield Outcomes(where, 2, cases)
    end_drains_below(where)


@pytest.fixture(scope="module")
def more_kinds(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("more"), 2, [files("enable", case) for case in MORE_KINDS])


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return LaunchedOutcomes(tmp_path_factory.mktemp("one"), 1, [files("enable", case) for case in ALONE])


@pytest.fixture(scope="module")
def own_adam(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """By optimizers that DeepSpeed compiles when they are first used: here, once, before two ranks want them."""
    command = [
        sys.executable,
        "-c",
        "from deepspeed.ops.op_builder import *; CPUAdamBuilder().load(); FusedAdamBuilder().load()",
    ]
    built = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=BUILD_S)
    if built.returncode != 0:
        pytest.skip(f"DeepSpeed cannot compile its optimizers here: {built.stderr.strip()[-300:]}")
    return Outcomes(tmp_path_factory.mktemp("adam"), 2, [files("enable", case) for case in OWN_ADAM])


def assert_files(ranks: list[Fields], case: Fields) -> None:
    last = case.get("tags", ["first", "second"])[-1]
    assert any(rank["files"] for rank in ranks)
    for rank in ranks:
        assert rank["differences"] == []
        assert rank["lost"] == []
        assert (rank["latest"], rank["leftovers"]) == (last, [])


def assert_later(ranks: list[Fields]) -> None:
    """Nothing was there yet when save_checkpoint() returned."""
    for rank in ranks:
        assert rank["at_return"]["latest"] in ([], ["same"]), "`latest` has moved to what is not durable"
        assert rank["at_return"]["files"] == []


def test_the_comparison_accepts_what_deepspeed_writes(two_ranks: Outcomes) -> None:
    ranks = two_ranks[f"stock {name_of(KINDS[0])}"]
    assert_files(ranks, KINDS[0])
    assert ranks[0]["at_return"]["files"], "it has no later to write in"


@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_files_hold_what_was_saved(case: Fields, two_ranks: Outcomes) -> None:
    ranks = two_ranks[f"enable {name_of(case)}"]
    assert_files(ranks, case)
    assert_later(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_KINDS, ids=name_of)
def test_files_of_more_kinds_hold_what_was_saved(case: Fields, more_kinds: Outcomes) -> None:
    ranks = more_kinds[f"enable {name_of(case)}"]
    assert_files(ranks, case)
    assert_later(ranks)


@pytest.mark.parametrize("case", WAYS, ids=name_of)
def test_files_hold_what_was_saved_in_other_ways(case: Fields, two_ranks: Outcomes) -> None:
    ranks = two_ranks[f"enable {name_of(case)}"]
    assert_files(ranks, case)
    assert_later(ranks)


def test_an_engine_that_is_attached_to(two_ranks: Outcomes) -> None:
    ranks = two_ranks[f"attach {name_of(KINDS[0])}"]
    assert_files(ranks, KINDS[0])
    assert_later(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", OWN_ADAM, ids=name_of)
def test_optimizers_that_deepspeed_compiles(case: Fields, own_adam: Outcomes) -> None:
    """They write to tensors behind torch's back: no version counter tells of it."""
    ranks = own_adam[f"enable {name_of(case)}"]
    assert_files(ranks, case)
    assert_later(ranks)
    assert ranks[0]["optimizer"] == ("DeepSpeedCPUAdam" if case.get("offload") else "FusedAdam")


@pytest.mark.parametrize("case", ALONE, ids=name_of)
def test_one_rank_alone(case: Fields, one_rank: Outcomes) -> None:
    ranks = one_rank[f"enable {name_of(case)}"]
    assert_files(ranks, case)
    assert_later(ranks)


@pytest.mark.parametrize(
    ("engine", "case"),
    [("attach", case) for case in ATTACHED] + [("enable", case) for case in TREES],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_the_tree_is_that_of_deepspeed(engine: str, case: Fields, two_ranks: Outcomes) -> None:
    stock, ours = two_ranks[f"tree stock {name_of(case)}"], two_ranks[f"tree {engine} {name_of(case)}"]
    assert ours[0]["files"] == stock[0]["files"]
    assert ours[0]["differences"] == []


@pytest.mark.parametrize("case", BY_NODES, ids=name_of)
def test_the_tree_that_comes_home_from_nodes_is_that_of_deepspeed(case: Fields, two_ranks: Outcomes) -> None:
    stock, ours = two_ranks[f"tree stock {name_of(case)}"], two_ranks[f"tree nodes {name_of(case)}"]
    assert ours[0]["files"] == stock[0]["files"]
    assert ours[0]["differences"] == []
    homes = {json.loads(path.read_text())["home"] for path in two_ranks.directory.glob("node-0/*/node.json")}
    assert str(two_ranks.directory / f"tree nodes {name_of(case)}") in homes, "it did not go that way"


def test_every_tag_has_its_manifest(two_ranks: Outcomes) -> None:
    where = two_ranks.directory / f"enable {name_of(KINDS[0])}"
    assert sorted(path.parent.name for path in where.glob("*/manifest.json")) == ["first", "second"]
