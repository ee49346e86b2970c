"""What stays beside the newest: each n-th step, and the best by a metric."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, options

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.directory.keeping import Keeping
from ckpt.directory.manifest import Manifest
from ckpt.integrations.torch import CheckpointCallback

pytestmark = pytest.mark.usefixtures("native")


def make(directory: Path, **settings: Any) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, options=options(), **settings)


def save(checkpointer: ckpt.Checkpointer, losses: dict[int, Any]) -> list[int]:
    """Steps and their losses, None for no metrics; returns the steps that are left."""
    for step, loss in losses.items():
        metrics = None if loss is None else {"loss": loss, "other": 1}
        checkpointer.save(step, {"x": torch.ones(3)}, metrics=metrics).result(DEADLINE_S)
    return checkpointer.steps()


def test_each_nth_step_stays(tmp_path: Path) -> None:
    with make(tmp_path, keep=1, keep_every=4) as checkpointer:
        assert save(checkpointer, dict.fromkeys(range(1, 10))) == [4, 8, 9]
    with make(tmp_path, keep=1) as checkpointer:
        checkpointer.restore()
        assert save(checkpointer, {10: None}) == [10], "only who asks for it keeps them"


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 5, 6]), ("max", [1, 4, 6])])
def test_the_best_stay_also_for_a_job_that_resumes(mode: str, kept: list[int], tmp_path: Path) -> None:
    how = {"keep": 1, "keep_best": 2, "best_by": "loss", "best_mode": mode}
    with make(tmp_path, **how) as checkpointer:
        save(checkpointer, {1: 0.9, 2: torch.tensor(0.1)})
    with make(tmp_path, **how) as checkpointer:
        checkpointer.restore()
        assert save(checkpointer, {3: 0.5, 4: 0.7, 5: 0.2, 6: float("nan")}) == kept
    manifest = manifests.read(tmp_path / f"step-{kept[0]:012d}")
    assert dict(manifest.metrics).keys() == {"loss", "other"}
    assert dict(manifests.read(tmp_path / "step-000000000006").metrics) == {"other": 1.0}, "what is no number is left out"


def test_of_equals_the_newer_is_better_and_what_has_no_metrics_is_not(tmp_path: Path) -> None:
    with make(tmp_path, keep=1, keep_best=1, best_by="loss") as checkpointer:
        assert save(checkpointer, {1: 0.5, 2: 0.5, 3: None, 4: None}) == [2, 4]


def test_what_lacks_files_is_not_the_best_in_the_place_of_another(tmp_path: Path) -> None:
    """But it stays, as the best would: somebody may bring the file back."""
    with make(tmp_path, keep=1, keep_best=1, best_by="loss") as checkpointer:
        save(checkpointer, {1: 0.1})
        (tmp_path / "step-000000000001" / "state.pt").unlink()
        assert save(checkpointer, {2: 0.2, 3: 0.3, 4: 0.4}) == [1, 2, 4]
        assert save(checkpointer, {5: 0.05, 6: 0.5}) == [5, 6]


def damage(directory: Path, step: int) -> None:
    path = directory / f"step-{step:012d}" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_a_restore_has_found_damaged_stands_in_for_no_other(tmp_path: Path) -> None:
    """Neither of the newest, nor of the best: it may be the one that is left."""
    with make(tmp_path, keep=2) as checkpointer:
        save(checkpointer, {1: 0.5, 2: 0.1})
    damage(tmp_path, 2)
    with make(tmp_path, keep=2) as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        assert save(checkpointer, {3: 0.4}) == [1, 2, 3]
        assert save(checkpointer, {4: 0.6}) == [3, 4]


def test_a_best_one_that_is_damaged_is_not_the_best_in_the_place_of_another(tmp_path: Path) -> None:
    how = {"keep": 1, "keep_best": 1, "best_by": "loss"}
    with make(tmp_path, **how) as checkpointer:
        save(checkpointer, {1: 0.1, 2: 0.5})
    damage(tmp_path, 1)
    with make(tmp_path, **how) as checkpointer:
        with pytest.raises(ckpt.CorruptError):
            checkpointer.restore(step=1)
        checkpointer.restore()
        assert save(checkpointer, {3: 0.4, 4: 0.6, 5: 0.7}) == [1, 3, 5]
        assert save(checkpointer, {6: 0.05, 7: 0.7}) == [6, 7]


def test_a_commit_that_is_told_of_twice_counts_once() -> None:
    """As at home and on a node, where its files may be called otherwise."""
    best, second, third = (Manifest(step, step, 1, (), metrics=(("loss", float(step)),)) for step in (1, 2, 3))
    again = dataclasses.replace(best, others=("notes.txt",))
    keeping = Keeping(1, None, 2, "loss")
    assert keeping.best_of([best, again, second, third]) == {1, 2}
    assert keeping.wants(second, [best, again, third, second]) and not keeping.wants(third, [best, again, third, second])


def test_what_is_no_number_in_a_manifest_is_not_the_best() -> None:
    odd = [Manifest(step, step, 1, (), metrics=(("loss", value),)) for step, value in enumerate((float("nan"), -math.inf, 2.0))]
    assert Keeping(1, None, 1, "loss").best_of(odd) == {2}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"keep": 0}, ValueError, "keep must be at least 1"),
        ({"keep_every": 0}, ValueError, "keep_every"),
        ({"keep_every": True}, ValueError, "keep_every"),
        ({"keep_best": 1}, ValueError, "give both"),
        ({"best_by": "loss"}, ValueError, "give both"),
        ({"keep_best": 1, "best_by": 3}, TypeError, "name of a metric"),
        ({"keep_best": 1, "best_by": "loss", "best_mode": "lowest"}, ValueError, "'min'.*or 'max'"),
    ],
)
def test_what_cannot_be_meant(given: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        make(tmp_path, **given)


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        (0.5, TypeError, "dict of names and numbers"),
        ({"loss": "low"}, TypeError, "'loss' must be a number"),
        ({"loss": torch.ones(2)}, TypeError, "'loss' must be a number"),
        ({"loss": 10**5000}, ValueError, "'loss' is too large"),
        ({"los": 0.5}, ValueError, r"has \['los'\], and best_by= asks for 'loss'"),
    ],
)
def test_metrics_that_are_none_are_refused_before_anything_is_saved(
    metrics: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with make(tmp_path, keep_best=1, best_by="loss") as checkpointer:
        with pytest.raises(error, match=words):
            checkpointer.save(1, {"x": 1}, metrics=metrics)
        assert save(checkpointer, {1: 0.5}) == [1]


def test_the_callback_passes_on_what_stays(tmp_path: Path) -> None:
    how = {"keep": 1, "keep_every": 5, "keep_best": 1, "best_by": "loss", "options": options()}
    with CheckpointCallback(tmp_path, model=torch.nn.Linear(1, 1), **how) as callback:
        for step in range(1, 8):
            pending = callback.step(step, {"loss": abs(step - 3)})
            assert pending is not None
            pending.result(DEADLINE_S)
        assert callback.checkpointer.steps() == [3, 5, 7]


def test_why_each_stays() -> None:
    manifests = [Manifest(step, step, 1, (), metrics=(("loss", abs(step - 3.0)),)) for step in (9, 8, 5, 4, 3, 2)]
    keeping = Keeping(2, 4, 1, "loss").with_pinned(2)
    reasons = dict(zip([each.step for each in manifests], keeping.reasons(manifests), strict=True))
    assert reasons == {
        9: "one of the newest 2",
        8: "one of the newest 2",
        5: "",
        4: "its step is a multiple of 4",
        3: "the best by loss",
        2: "a job has gone back to it",
    }
    assert Keeping.parse(2, keeping.to_json()) == keeping
