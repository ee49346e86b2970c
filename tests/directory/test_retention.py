"""What cannot be removed, or is not ours to remove, does not keep other old steps from being removed."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.storage import temporary_names

pytestmark = pytest.mark.usefixtures("native")


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((5_000,), float(step))}


def make(directory: Path, keep: int | None = 2) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, keep=keep, options=options())


def save(checkpointer: ckpt.Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, state(step)).result(DEADLINE_S)


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:012d}"


def move_away(step: Path, elsewhere: Path) -> dict[str, bytes]:
    """A link stays behind; returns what is in it."""
    step.rename(elsewhere)
    step.symlink_to(elsewhere)
    return contents(elsewhere)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def kept(*steps: int) -> list[str]:
    return [".lock", "events.jsonl", "latest", *(step_path(Path(), step).name for step in steps)]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("others", [False, True], ids=["ours", "with files of others"])
def test_of_a_step_that_was_moved_the_link_is_removed(others: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with make(directory, keep=None) as checkpointer:
        save(checkpointer, 1)
        if others:
            (step_path(directory, 1) / "manifest.json").unlink()
            save(checkpointer, 1)
            assert manifests.read(step_path(directory, 1)).others
    before = move_away(step_path(directory, 1), elsewhere)
    caplog.clear()
    with make(directory) as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        assert_same(state(1), found.state)
        save(checkpointer, *range(2, 6))
        assert checkpointer.steps() == [4, 5]
    assert names(directory) == kept(4, 5)
    assert contents(elsewhere) == before
    warned = warnings_in(caplog)
    assert len(warned) == 1 and str(elsewhere) in warned[0] and "link" in warned[0]


def test_a_link_that_a_former_version_has_retired_goes(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with make(directory) as checkpointer:
        save(checkpointer, 1)
        before = move_away(step_path(directory, 1), elsewhere)
        step_path(directory, 1).rename(temporary_names.temporary_path(step_path(directory, 1)))
        (directory / temporary_names.temporary_path(step_path(directory, 2)).name).symlink_to("nowhere")
        save(checkpointer, 3)
    assert names(directory) == kept(3)
    assert contents(elsewhere) == before


def test_nothing_is_cleaned_through_a_link(tmp_path: Path) -> None:
    """Another job may save there."""
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with make(directory) as checkpointer:
        save(checkpointer, 1)
    move_away(step_path(directory, 1), elsewhere)
    temporary_names.temporary_path(elsewhere / "state-2.pt").touch()
    (elsewhere / "state-3.pt").touch()
    (tmp_path / "begun").mkdir()
    temporary_names.temporary_path(tmp_path / "begun" / "state.pt").touch()
    step_path(directory, 2).symlink_to(tmp_path / "begun")
    step_path(directory, 3).symlink_to("nowhere")
    before = contents(elsewhere), contents(tmp_path / "begun")
    with make(directory) as checkpointer:
        save(checkpointer, 7)
        assert checkpointer.steps() == [1, 7]
    assert (contents(elsewhere), contents(tmp_path / "begun")) == before
    assert names(directory) == kept(1, 2, 3, 7)


@pytest.mark.parametrize("call", ["rename", "rmdir", "unlink"])
def test_one_that_cannot_be_removed_does_not_keep_the_others(
    call: str, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    native.set_fault(call, ".tmp-step-000000000002", error=errno.EBUSY)
    with make(tmp_path) as checkpointer:
        save(checkpointer, *range(1, 9))
        checkpointer.wait(DEADLINE_S)
        assert checkpointer.steps() == ([2, 7, 8] if call == "rename" else [7, 8])
    left = [name for name in names(tmp_path) if "step-" in name]
    assert len(left) == 3 and sum("step-000000000002" in name for name in left) == 1
    warned = warnings_in(caplog)
    assert len(warned) == 1 and "step-000000000002" in warned[0], "said once"
    with make(tmp_path) as checkpointer:  # nor does the next job fail over it
        save(checkpointer, 20, 21)
        assert checkpointer.steps() == ([2, 20, 21] if call == "rename" else [20, 21])
        native.clear_faults()
        save(checkpointer, 22)
    assert names(tmp_path) == kept(21, 22)


def test_a_leftover_that_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        step_path(tmp_path, step).mkdir()
        temporary_names.temporary_path(step_path(tmp_path, step) / "state.pt").touch()
    native.set_fault("rename", ".tmp-step-000000000001", error=errno.EBUSY)
    native.set_fault("rmdir", ".tmp-step-000000000002", error=errno.EBUSY)
    with make(tmp_path) as checkpointer:
        save(checkpointer, 9)
        left = [name for name in names(tmp_path) if "step-" in name and "9" not in name[-1:]]
        assert not any("step-000000000003" in name for name in left)
        assert {step for step in (1, 2) for name in left if f"step-{step:012d}" in name} == {1, 2}
        assert len(warnings_in(caplog)) == 2
        native.clear_faults()
    with make(tmp_path) as checkpointer:
        save(checkpointer, 10)
    assert names(tmp_path) == kept(9, 10)
