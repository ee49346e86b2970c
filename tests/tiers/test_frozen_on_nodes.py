"""Frozen tensors in a file of their own, of saves that land on a disk of the node first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import DEADLINE_S, assert_same, options
from tier_places import end_drains_below

import ckpt
from ckpt.saving import frozen_file

pytestmark = pytest.mark.usefixtures("native")
MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(frozen_file, "LEAST_BYTES", MIB)
    yield tmp_path
    end_drains_below(tmp_path)


def made(base: Path) -> ckpt.Checkpointer:
    setting = options(frozen="separate")
    return ckpt.Checkpointer(base / "home", keep=None, options=setting, tiers=[ckpt.Tier.node(base / "node-0", keep=3)])


def test_it_is_linked_there_and_comes_home_whole(base: Path) -> None:
    frozen = {name: torch.randn(MIB // 4) for name in "ab"}
    state = {"frozen": frozen, "n": torch.zeros(MIB // 4)}
    with made(base) as checkpointer:
        for step in range(3):
            state["n"].add_(1)
            pending = checkpointer.save(step, state, frozen=list(frozen.values()))
            landed = Path(pending.on_tier("node").result(DEADLINE_S))
            assert (pending.stats.reused_bytes > 2 * MIB) == (step > 0)
            path = pending.result(DEADLINE_S)
            assert_same(state, ckpt.load(landed))
            assert_same(state, ckpt.load(path))
            shared = [entry.get("shared_bytes", 0) for entry in json.loads((path / "manifest.json").read_text())["files"]]
            assert shared == [0, 0], "at home it is a copy"
        found = checkpointer.restore()
        assert found is not None and set(found.sources.values()) == {"node"}
        assert_same(state, found.state)
        damage(next(landed.glob("*.frozen*.pt")))
        found = checkpointer.restore()
        assert found is not None and found.step == 2
        assert {name.split(".")[1][:6]: source for name, source in found.sources.items()} == {"pt": "node", "frozen": "home"}
        assert_same(state, found.state)
        target = {"frozen": {name: torch.zeros(MIB // 4) for name in "ab"}, "n": torch.zeros(MIB // 4)}
        found = checkpointer.restore(into=target)
        assert found is not None and found.step == 2
        assert_same(state, target)
    shutil.rmtree(base / "node-0")
    with ckpt.Checkpointer(base / "home") as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 2
        assert_same(state, found.state)


def damage(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(b"\xff" * 64)
