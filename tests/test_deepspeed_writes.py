"""DeepSpeed's own ways to write to parameters and to the optimizer's state: what was saved before holds what was there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from dist.deepspeed_runs import Fields, Outcomes

pytestmark = pytest.mark.usefixtures("native")

ZERO = ({"stage": 1}, {"stage": 2}, {"stage": 3})
EARLY: Fields = {"engine": "attach"}  # the parameters have their methods before anything is enabled
MUON: Fields = {"variant": "pipeline", "stage": 1, "muon": True}


def case(way: str, **fields: Any) -> Fields:
    given = {"precision": "bf16", "engine": "enable"} | fields
    words = [str(value) if name in ("engine", "precision", "variant") else f"{name}={value}" for name, value in given.items()]
    return {"name": " ".join([way, *words]), "mode": "written", "tags": [way]} | given


CASES = [
    case("by_the_parameter", **EARLY, **ZERO[0]),  # first: whatever is enabled stays so
    *(case("full_parameters", **zero) for zero in ZERO),
    *(case("full_state", **zero) for zero in ZERO),
    case("by_the_parameter", **ZERO[1]),
    case("fragments", **ZERO[0]),
    case("local_parameters", **ZERO[2]),
    case("local_state", **ZERO[2]),
    *(case("refresh", **zero) for zero in ZERO),
    *(case("optimizer_state", **zero) for zero in ({"stage": 0}, *ZERO)),
    *(case("module_state", **zero) for zero in ({"stage": 0}, *ZERO[:2])),
    case("gathered", precision="fp32", **ZERO[2]),
    case("universal", **ZERO[0]),
    *(case("own_step", muon=True, **zero) for zero in ZERO),
    *(case("whole_step", precision=precision, **MUON) for precision in ("fp32", "fp16", "bf16")),
]


class Writes(Outcomes):
    script = Path(__file__).parent / "dist" / "deepspeed_writes.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Writes(tmp_path_factory.mktemp("writes"), 2, CASES)


@pytest.mark.parametrize("name", [fields["name"] for fields in CASES])
def test_what_writes_to_the_state_waits_for_what_was_saved(name: str, ranks: Outcomes) -> None:
    found = ranks[name]
    assert any(rank["changed"] and rank["files"] for rank in found), "nothing was written to"
    for rank in found:
        assert (rank["raised"], rank["wait"], rank["differences"]) == (None, None, [])
        assert not rank["changed"] or rank["captured"] == [True]
