"""Ranks that take different ways to one save: by the disk of their node, and straight home."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt.commit.conversation import Failure
from ckpt.commit.node_target import NodeStepTarget
from ckpt.commit.step_target import StepTarget
from ckpt.commit.target import Prepared, SaveCall
from ckpt.directory.keeping import Keeping
from ckpt.directory.manifest import FileEntry
from ckpt.directory.node_place import NodePlace
from ckpt.directory.steps import StepDirectories

FILES = (FileEntry("rank-00000.pt", 1, 2), FileEntry("rank-00001.pt", 3, 4, rank=1))


@pytest.mark.parametrize("leader", ["home", "node"])
def test_it_is_given_up_and_said(leader: str, tmp_path: Path) -> None:
    home = StepDirectories(tmp_path, Keeping(), shared=True, max_in_flight=1)
    path = tmp_path / "step-000000000001"
    details = (SaveCall(0, 1, "step 1", path, path), home, 0, 2)
    target = StepTarget(*details)
    if leader == "node":
        target = NodeStepTarget(*details, home=home, place=NodePlace(0, 2, (0,)), path=path)
    answers = [Prepared(FILES[:1], node=target.node), Prepared(FILES[1:], node="1" if leader == "home" else "")]
    chosen = target.choose(answers, lambda _: [])
    assert isinstance(chosen, Failure) and chosen.ranks == (1,)
    assert "straight to" in chosen.text and "by way of" in chosen.text and str(tmp_path) in chosen.text
