"""Parameters that do not learn under DeepSpeed: they are not read once they seem to be frozen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from reuse_runs import sharing  # noqa: F401  a fixture

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from dist.deepspeed_runs import Fields, Outcomes

MIB = 1 << 20


class Unread(Outcomes):
    module = "deepspeed_frozen"


@pytest.mark.slow  # DeepSpeed takes long to import; what it gives is what the callback gives
def test_what_does_not_learn_is_not_read(sharing: Path) -> None:  # noqa: F811
    """Written to past torch's eyes, it is. With stage 3 each save makes a copy of it, which is read."""
    cases: list[Fields] = [
        {"name": f"stage{stage}", "mode": "unread", "stage": stage, "directory": str(sharing / f"stage{stage}")}
        for stage in (0, 2)
    ]
    outcomes = sharing / "outcomes"
    outcomes.mkdir()
    found = Unread(outcomes, 1, cases)
    for case in cases:
        (outcome,) = found[case["name"]]
        assert outcome["right"]
        assert [each > MIB for each in outcome["unread"]] == [False] * 2 + [True] * 3 + [False], case["name"]
