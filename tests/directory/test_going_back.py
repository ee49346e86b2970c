"""restore(step=): a job goes back to a step that is not the newest, and trains on from there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.integrations.torch import CheckpointCallback

pytestmark = pytest.mark.usefixtures("native")


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((5_000,), float(step)), "step": step}


def make(directory: Path, **settings: Any) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, options=options(), **settings)


def save(checkpointer: ckpt.Checkpointer, *steps: int, offset: int = 0) -> None:
    for step in steps:
        checkpointer.save(step, state(step + offset)).result(DEADLINE_S)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With the steps 1 to 5."""
    with make(tmp_path / "run", keep=None) as checkpointer:
        save(checkpointer, *range(1, 6))
    return tmp_path / "run"


def damage(home: Path, step: int) -> None:
    path = home / f"step-{step:012d}" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_job_goes_on_from_the_step(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it saves is the newest, also below steps that are there; those stay until they are replaced."""
    with make(home, keep=None) as checkpointer:
        found = checkpointer.restore(step=2)
        assert found is not None and found.step == 2
        assert_same(state(2), found.state)
        assert "there are newer checkpoints (of 3 steps: 3, 4, 5)" in caplog.text
        save(checkpointer, 3, offset=100)
        assert (home / "latest").read_text().strip() == "step-000000000003"
        assert checkpointer.steps() == [1, 2, 3, 4, 5]
        again = checkpointer.restore()
        assert again is not None and again.step == 3
        assert_same(state(103), again.state)
    with make(home) as checkpointer:
        again = checkpointer.restore(into=state(0))
        assert again is not None and again.state["step"] == 103


def test_into_what_is_there(home: Path) -> None:
    target = state(0)
    with make(home) as checkpointer:
        assert checkpointer.restore(step=4, into=target) is not None
    assert_same(state(4), target)


def test_nothing_is_said_of_newer_ones_where_there_are_none(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make(home) as checkpointer:
        assert checkpointer.restore(step=5) is not None
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_step_stays_as_long_as_the_job_saves(home: Path) -> None:
    """Else it would be the first to go: it was committed before those that were given up."""
    with make(home, keep=2) as checkpointer:
        checkpointer.restore(step=2)
        save(checkpointer, 3, 4)
        assert checkpointer.steps() == [2, 3, 4]
        save(checkpointer, 5)
        assert checkpointer.steps() == [2, 4, 5]
    with make(home, keep=2) as checkpointer:
        checkpointer.restore()
        save(checkpointer, 6)
        assert checkpointer.steps() == [5, 6]


def test_a_step_that_is_not_there(home: Path, tmp_path: Path) -> None:
    with make(home) as checkpointer:
        with pytest.raises(ckpt.NotACheckpointError, match=r"no checkpoint of step 9 in '.*run': there are .* 1, 2, 3, 4, 5$"):
            checkpointer.restore(step=9)
        assert checkpointer.restore(step=1) is not None, "after the error it goes on"
    with make(tmp_path / "empty") as checkpointer, pytest.raises(ckpt.NotACheckpointError, match="nor of any other step"):
        checkpointer.restore(step=9)
    assert not (tmp_path / "empty").exists()


def test_no_other_step_stands_in_for_one_that_is_damaged(home: Path) -> None:
    damage(home, 4)
    (home / "step-000000000003" / "manifest.json").write_text("{")
    (home / "step-000000000002" / "manifest.json").unlink()
    with make(home) as checkpointer:
        for step, what in ((4, "CRC-32"), (3, "manifest")):
            with pytest.raises(ckpt.CorruptError, match=rf"step {step} in '.*' is not good: .*{what}.*ckpt list"):
                checkpointer.restore(step=step)
        with pytest.raises(ckpt.NotACheckpointError, match=r"no checkpoint of step 2 in .* of steps 1, 4, 5; .* no manifest"):
            checkpointer.restore(step=2)
        assert checkpointer.restore(step=5) is not None


@pytest.mark.parametrize(
    ("given", "error"), [({"step": -1}, ValueError), ({"step": "3"}, TypeError), ({"step": 3, "fresh": True}, ValueError)]
)
def test_what_cannot_be_meant(given: dict[str, Any], error: type[Exception], home: Path) -> None:
    with make(home) as checkpointer:
        with pytest.raises(error, match="step"):
            checkpointer.restore(**given)
        assert checkpointer.restore() is not None


def test_the_callback_goes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with CheckpointCallback(tmp_path, model=model, keep=None, options=options()) as callback:
        for step in (1, 2, 3):
            model.weight.data.fill_(step)
            callback.step(step)
    with CheckpointCallback(tmp_path, model=model, options=options()) as callback:
        assert callback.resume(step=2) == 2 and model.weight.data.unique().tolist() == [2.0]
        with pytest.raises(ckpt.NotACheckpointError, match="1, 2, 3"):
            callback.resume(step=7)
