"""What reads checkpoints in a process that saves gets the newest; what reads a part of one needs nothing but that part."""

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

PARTS = ("module only", "no states", "neither", "all")
READERS = {"state_dict": 2, "into_a_model": 1, "converted": 3}  # each with a stage of ZeRO


def case(mode: str, stage: int, **fields: Any) -> Fields:
    common = {"engine": "enable", "precision": "fp32", "same_buffers": True, "stage": stage}
    return common | {"name": f"{mode} {stage} {' '.join(fields.get('tags', []))}".strip(), "mode": mode} | fields


CASES = [
    *(case("readers", stage, tags=[reader]) for reader, stage in READERS.items()),
    case("listings", 1),
    case("two_engines", 1),
    *(case("rejected", stage, tags=["flip"]) for stage in (1, 2)),
    case("rejected", 3, tags=["flip"]),
    case("rejected", 3, tags=["delete"]),
    *(case("deleted", stage) for stage in (1, 2, 3)),
    case("deleted", 1, precision="bf16", variant="pipeline", name="deleted pipeline"),
]


class Readers(Outcomes):
    module = "deepspeed_readers"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Readers(tmp_path_factory.mktemp("readers"), 2, CASES)


def read(reader: str, ranks: Outcomes) -> Fields:
    return ranks[f"readers {READERS[reader]} {reader}"][0]


@pytest.mark.parametrize("reader", READERS)
def test_one_rank_reads_what_was_just_saved(reader: str, ranks: Outcomes) -> None:
    found = read(reader, ranks)
    assert [found[name] for name in ("first by None", "second by None", "second by second", "aside")] == [True] * 4


@pytest.mark.parametrize("reader", READERS)
def test_older_weights_are_read_only_by_their_tag(reader: str, ranks: Outcomes) -> None:
    """After a save that has failed."""
    found = read(reader, ranks)
    for way in ("failed", "failed, later", "failed, by its tag"):
        assert found[way]["type"] == "CheckpointError"
        assert "/failed', failed: " in found[way]["text"] and "Input/output error" in found[way]["text"]
    assert "'second'" in found["failed"]["text"]
    assert (found["the one before"], found["good"]) == (True, True)


def test_what_lists_files_waits_for_them(ranks: Outcomes) -> None:
    assert {name: ranks["listings 1"][0][name] for name in ("optimizers", "model", "checkpoint")} == {
        "optimizers": 2,
        "model": "mp_rank_00_model_states.pt",
        "checkpoint": 1,
    }


@pytest.mark.parametrize("loads", ["stock", "other"])
def test_another_engine_loads_what_was_just_saved(loads: str, ranks: Outcomes) -> None:
    for found in ranks["two_engines 1"]:
        assert found[loads] == [f"for {loads}", True]


@pytest.mark.parametrize(("stage", "damage"), [(3, "flip"), (3, "delete")])
def test_weights_are_those_of_the_tag_that_was_chosen(stage: int, damage: str, ranks: Outcomes) -> None:
    for found in ranks[f"rejected {stage} {damage}"]:
        for way, tag in (("newest", "two"), ("by tag", "one"), ("damaged", "one")):
            assert (found[way]["error"], found[way]["path"], found[way]["same"]) == (None, tag, True)
        assert any("'one'" in text for text in found["damaged"]["logged"])


@pytest.mark.parametrize("stage", [1, 2])
def test_damage_that_is_not_read_is_no_reason_to_take_an_older_one(stage: int, ranks: Outcomes) -> None:
    for found in ranks[f"rejected {stage} flip"]:
        assert (found["damaged"]["error"], found["damaged"]["path"], found["damaged"]["logged"]) == (None, "two", [])
        assert (found["by tag"]["path"], found["by tag"]["same"]) == ("one", True)


@pytest.mark.parametrize("name", ["deleted 1", "deleted 2", "deleted 3", "deleted pipeline"])
def test_without_the_files_of_the_optimizer_a_load_ends_as_with_deepspeed(name: str, ranks: Outcomes) -> None:
    for found in ranks[name]:
        for part in PARTS:
            stock, ours = found[part]["stock"], found[part]["ours"]
            if stock["error"] is None:
                assert ours == stock
            else:
                assert ours["error"]["type"] == "CorruptError" and "_optim_states.pt" in ours["error"]["text"]
        needed = ["no states", "neither", "all"] if name == "deleted 3" else ["all"]
        assert [part for part in PARTS if found[part]["stock"]["error"]] == needed
        assert name == "deleted 3" or found["module only"]["ours"]["same"]


@pytest.mark.parametrize("name", ["deleted 1", "deleted 2"])
def test_what_is_read_is_verified(name: str, ranks: Outcomes) -> None:
    for found in ranks[name]:
        assert found["damaged too"]["error"]["type"] == "CorruptError"
        assert "has 5000 bytes" in found["damaged too"]["error"]["text"]
