"""Nodes and home on file systems of their own: of several kinds, and full."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mounting import MIB, fill, mounted
from support import DEADLINE_S, assert_same, options
from test_node_level import land, restored, state
from test_node_saves import end_drains

import ckpt
from ckpt.errors import StorageError, SupersededError
from ckpt.tiers import home_watch

pytestmark = pytest.mark.usefixtures("native")
ROOM = 8 * MIB
LARGE = {"value": 0, "data": torch.zeros(2 * MIB // 4)}


class Disks(NamedTuple):
    """Where both are mounted."""

    node: Path
    home: Path

    @contextlib.contextmanager
    def checkpointer(self) -> Iterator[ckpt.Checkpointer]:
        tier = ckpt.Tier.node(self.node / "ckpt")
        with ckpt.Checkpointer(self.home / "run", keep=2, options=options(max_failed_saves=0), tiers=[tier]) as made:
            yield made


@contextlib.contextmanager
def disks(tmp_path: Path, node: str, home: str) -> Iterator[Disks]:
    with mounted(node, tmp_path / "node", ROOM) as at_node, mounted(home, tmp_path / "home", ROOM) as at_home:
        try:
            yield Disks(at_node, at_home)
        finally:
            end_drains(tmp_path, "node/ckpt")


@pytest.mark.parametrize(("node", "home"), [("ext4", "xfs"), ("xfs", "btrfs"), ("btrfs", "ext4"), ("ext4", "tmpfs")])
def test_from_one_kind_to_another(node: str, home: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with disks(tmp_path, node, home) as places:
        with places.checkpointer() as made:
            for step in range(4):
                assert land(made, step, step).is_relative_to(places.node)
            made.wait(DEADLINE_S)
            assert restored(made) == (3, 3)
        step = places.home / "run" / "step-000000000003"
        assert_same(state(3), torch.load(step / "state.pt"))
        with places.checkpointer() as made:
            assert restored(made) == (3, 3)
        with ckpt.Checkpointer(places.home / "run", options=options()) as without:
            assert restored(without) == (3, 3)
    assert "same device" not in caplog.text


def test_what_finds_no_room_on_a_full_node_goes_home(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those whose way was settled while there was room: they fail."""
    monkeypatch.setattr(home_watch, "_UNNOTED_S", 0.5)
    caplog.set_level(logging.CRITICAL, "ckpt")
    with disks(tmp_path, "ext4", "tmpfs") as places, places.checkpointer() as made:
        first = made.save(0, state(0))
        assert first.on_tier("node").result(DEADLINE_S).is_relative_to(places.node)
        ballast = fill(places.node, 0)
        outcomes = [made.save(step, state(step)).exception(DEADLINE_S) for step in range(1, 7)]
        failed = [error for error in outcomes if error is not None]
        assert outcomes[4:] == [None, None] and len(failed) <= 4, outcomes
        assert all(isinstance(error, StorageError) and error.errno == errno.ENOSPC for error in failed), failed
        assert restored(made) == (6, 6)
        assert first.exception(DEADLINE_S) is None or isinstance(first.exception(), SupersededError)
        assert (places.home / "run" / "step-000000000006" / "manifest.json").exists()
        ballast.unlink()
        landed = [land(made, step, step).is_relative_to(places.node) for step in range(7, 15)]
        assert landed[-1], "there is room again"


def test_training_goes_on_while_home_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "ckpt")
    with disks(tmp_path, "tmpfs", "ext4") as places, places.checkpointer() as made:
        made.save(0, state(0)).result(DEADLINE_S)
        ballast = fill(places.home, 64 << 10)
        pending = [made.save(step, LARGE | {"value": step}) for step in range(1, 4)]
        assert [each.on_tier("node").result(DEADLINE_S).is_relative_to(places.node) for each in pending] == [True] * 3
        assert (places.home / "run" / "latest").read_text().strip() == "step-000000000000"
        ballast.unlink()
        assert pending[-1].result(DEADLINE_S) == places.home / "run" / "step-000000000003"
        found = made.restore()
        assert found is not None and found.state["value"] == 3
        assert_same(LARGE["data"], found.state["data"])
