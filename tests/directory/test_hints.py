"""What is given to save(), or asked of restore(), in the wrong place: no state is lost without a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from support import DEADLINE_S, options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckpt
from ckpt.errors import CheckpointError, MismatchError
from ckpt.saving import notices

pytestmark = pytest.mark.usefixtures("native")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("nothing", [{}, {"state": None}, {"replicated": None, "sharded": None}], ids=len)
def test_nothing_is_no_checkpoint(nothing: dict[str, Any], tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        with pytest.raises(TypeError, match=r"nothing to save.*state=.*replicated=.*sharded="):
            checkpointer.save(1, **nothing)
        assert checkpointer.steps() == []
        assert checkpointer.save(2, {}).result(DEADLINE_S) and checkpointer.steps() == [2]


def test_shards_in_a_state_of_its_own_are_saved_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: as many ranks can restore them, and others cannot."""
    monkeypatch.setattr(notices, "noted_shards", set())
    td.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        with ckpt.Checkpointer(tmp_path, options=options(), coordinator="local") as checkpointer:
            checkpointer.save(1, {"w": 1}, sharded={"m": torch.ones(2)}).result(DEADLINE_S)
            assert not warnings_in(caplog)
            for step in (3, 4):
                shard = DTensor.from_local(torch.full((2,), float(step)), mesh, [Shard(0)], run_check=False)
                checkpointer.save(step, {"w": [shard]}).result(DEADLINE_S)
            (told,) = warnings_in(caplog)
            assert "state= holds a DTensor" in told and "give it as sharded=" in told
            with pytest.raises(MismatchError, match=r"w\.0 is a DTensor here.*sharded=.*sharded_into="):
                checkpointer.restore(into={"w": [shard]}, weights_only=False)
            found = checkpointer.restore(weights_only=False)
            assert found is not None and found.state["w"][0].to_local().tolist() == [4.0, 4.0]
    finally:
        td.destroy_process_group()


def test_a_sharded_state_is_not_left_out_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = {"m": torch.zeros(2)}
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, sharded={"m": torch.ones(2)}).result(DEADLINE_S)
        for name in ("into", "replicated_into"):
            with pytest.raises(
                CheckpointError, match=rf"nothing for {name}=.*it has a sharded state, which sharded_into= takes"
            ):
                checkpointer.restore(**{name: target})
        assert target["m"].tolist() == [0, 0] and not warnings_in(caplog)
        found = checkpointer.restore()
        assert found is not None and found.state is None and found.sharded is None
        (told,) = warnings_in(caplog)
        assert "step-000000000001' has a sharded state, which is left out: restore(sharded_into=state)" in told
        found = checkpointer.restore(sharded_into=target)
        assert found is not None and found.sharded is target and target["m"].tolist() == [1, 1]
        assert len(warnings_in(caplog)) == 1
