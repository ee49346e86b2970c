"""`ckpt prune`: what stays, what goes, and who may."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from command_line import Shell, in_use, save_steps, step_in
from support import options

import ckpt
from ckpt.directory.holds import FOLDER, NAME


def names(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step-*"))


def test_the_newest_stay(shell: Shell, home: Path) -> None:
    document = shell.json("prune", home, "--keep", "2")
    assert [(each["step"], each["fate"]) for each in document["checkpoints"]] == [(3, "keep"), (2, "keep"), (1, "remove")]
    assert names(home) == [1, 2, 3] and not document["done"]
    said = shell("prune", home, "--keep", "1", "--yes")
    assert said.code == 0 and "2 checkpoints of" in said.out.splitlines()[-1]
    assert names(home) == [3] and {path.name for path in home.iterdir()} == {
        *("latest", ".lock", "events.jsonl", "step-000000000003"),
    }
    with ckpt.Checkpointer(home, options=options()) as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == 3


def test_a_removal_that_was_interrupted_does_not_count(shell: Shell, home: Path) -> None:
    """It is not one of those that stay."""
    step_in(home, 3).rename(home / ".tmp-step-000000000003-00000000-1-000000000")
    assert shell("prune", home, "--keep", "1", "--yes").code == 0
    assert names(home) == [2]


def test_multiples_stay(shell: Shell, tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 15, 20, 25)
    assert shell("prune", tmp_path, "--keep", "1", "--keep-every", "10", "--yes").code == 0
    assert names(tmp_path) == [10, 20, 25]


def test_what_is_held_and_what_is_damaged_stays(shell: Shell, home: Path) -> None:
    place = home / FOLDER / "store"
    place.mkdir(parents=True)
    (place / NAME).write_text(json.dumps({"decided": [1], "held": [1], "every_steps": None, "all_others": False}))
    (step_in(home, 2) / "manifest.json").write_text("{")
    document = shell.json("prune", home, "--keep", "1", "--yes")
    assert [(each["step"], each["fate"]) for each in document["checkpoints"]] == [(3, "keep"), (1, "held")]
    assert names(home) == [1, 2, 3]


def test_bundles(shell: Shell, tmp_path: Path) -> None:
    with ckpt.BundleCheckpointer(options=options()) as bundles:
        for number in range(3):
            bundle = bundles.begin(tmp_path, f"global_step{number}", step=number)
            bundle.save({"w": torch.zeros(2)}, tmp_path / f"global_step{number}" / "a.pt")
            bundle.commit().result()
    (tmp_path / "latest").write_text("global_step1")
    document = shell.json("prune", tmp_path, "--keep", "1", "--yes")
    assert [each["fate"] for each in document["checkpoints"]] == ["keep", "held", "remove"]
    assert sorted(path.name for path in tmp_path.glob("global*")) == ["global_step1", "global_step2"]


def test_who_may_not_and_how_not(shell: Shell, home: Path, tmp_path: Path) -> None:
    with in_use(home):
        assert shell("prune", home, "--keep", "1", "--yes").code == shell("prune", home, "--keep", "1").code == 4
    assert names(home) == [1, 2, 3]
    for words in ((), ("--keep", "0"), ("--keep", "some")):
        assert shell("prune", home, *words).code == 2
    (tmp_path / "empty").mkdir()
    assert shell("prune", tmp_path / "empty", "--keep", "1").code == shell("prune", tmp_path / "none", "--keep", "1").code == 3
