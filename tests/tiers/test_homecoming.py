"""What is made of what lies on nodes, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ckpt.coordinator import make_coordinator
from ckpt.tiers.homecoming import MOVING, Homecoming, OnItsWay, _Judge
from ckpt.tiers.tier import Tier


def report(*sequences: int, trouble: str = "") -> dict[str, Any]:
    ways = [OnItsWay(f"step-{each}", f"tag-{each}", each, True, 0, MOVING) for each in sequences]
    said: dict[str, Any] = {"place": "a", "leads": True, "fatal": "", "trouble": trouble}
    return said | {"generations": [dataclasses.asdict(way) for way in ways]}


def test_what_another_job_saves_meanwhile_is_not_waited_for() -> None:
    """It would never end. What was there at first is."""
    judge = _Judge(None, 1000.0)
    assert judge.decide([report(1)])["wait"]
    assert judge.decide([report(1, 2)])["wait"]
    verdict = judge.decide([report(2, 3)])
    assert (verdict["wait"], verdict["error"]) == (False, "")


def test_what_a_disk_shows_later_is_waited_for() -> None:
    judge = _Judge(None, 1000.0)
    assert not judge.decide([report(trouble="it does not answer")])["wait"]
    assert judge.decide([report(1, trouble="it answers in part")])["wait"]
    assert judge.decide([report(1)])["wait"]


def test_a_disk_that_cannot_be_looked_at_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The other ranks wait for the word of this one, so it raises nothing. Here its name is too long for any file system."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".run").write_text(json.dumps({"run": 300 * "r"}))
    (tmp_path / "node").mkdir()
    homecoming = Homecoming(Tier.node(tmp_path / "node"), make_coordinator("local"), "test", 60.0, 60.0)
    homecoming.wait(home, None)
    assert "what lies on the node of rank 0 is left out" in caplog.text and "File name too long" in caplog.text
