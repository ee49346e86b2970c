"""`ckpt prune`: what stays, what goes, and who may."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Shell, in_use, save_steps, step_in
from places import PYTHONPATH
from support import options, patience
from test_verify import flip, place_of

import ckpt
from ckpt.directory.holds import FOLDER, NAME
from ckpt.errors import CorruptError


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


def test_what_goes_together_gives_back_more_than_each_alone(shell: Shell, tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    (step_in(tmp_path, 1) / "state.pt").unlink()
    (step_in(tmp_path, 1) / "state.pt").hardlink_to(step_in(tmp_path, 2) / "state.pt")
    document = shell.json("prune", tmp_path, "--keep", "1")
    one, two = (each for each in document["checkpoints"] if each["fate"] == "remove")
    assert max(one["frees"], two["frees"]) < one["bytes"] <= document["frees"] < one["bytes"] + two["bytes"]
    said = shell("prune", tmp_path, "--keep", "1", "--yes").out
    assert said.count("alone it gives back") == 2 and ", which give back " in said.splitlines()[-1]
    assert names(tmp_path) == [3]


def test_a_removal_that_was_interrupted_does_not_count(shell: Shell, home: Path) -> None:
    """It is not one of those that stay."""
    step_in(home, 3).rename(home / ".tmp-step-000000000003-00000000-1-000000000")
    assert shell("prune", home, "--keep", "1", "--yes").code == 0
    assert names(home) == [2]


def test_multiples_stay(shell: Shell, tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 15, 20, 25)
    assert shell("prune", tmp_path, "--keep", "1", "--keep-every", "10", "--yes").code == 0
    assert names(tmp_path) == [10, 20, 25]


def test_the_best_stay(shell: Shell, tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, keep=None, options=options()) as checkpointer:
        for step, loss in enumerate((3.0, 1.0, 2.0, 4.0)):
            checkpointer.save(step, {"x": step}, metrics={"loss": loss}).result()
    document = shell.json("prune", tmp_path, "--keep", "1", "--keep-best", "2", "--best-by", "loss", "--yes")
    assert [each["why"] for each in document["checkpoints"]][1:3] == ["one of the best 2 by loss"] * 2
    assert names(tmp_path) == [1, 2, 3]
    typed = shell("prune", tmp_path, "--keep", "1", "--keep-best", "2", "--best-by", "los", "--yes")
    assert typed.code == 1 and "'los'" in typed.err and "'loss'" in typed.err and names(tmp_path) == [1, 2, 3]
    refused = shell("prune", tmp_path, "--keep", "1", "--keep-best", "2")
    assert refused.code == 1 and "--best-by by which metric: give both" in refused.err


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


def test_what_has_lost_files_is_none_of_the_newest(shell: Shell, home: Path) -> None:
    """All that is left may be older."""
    (file,) = step_in(home, 3).glob("*.pt")
    file.write_bytes(file.read_bytes()[:-1])
    document = shell.json("prune", home, "--keep", "1", "--yes")
    assert [(each["step"], each["fate"]) for each in document["checkpoints"]] == [(3, "held"), (2, "keep"), (1, "remove")]
    assert names(home) == [2, 3]


def test_nothing_goes_for_one_whose_bytes_have_changed(shell: Shell, home: Path) -> None:
    path = step_in(home, 3) / "state.pt"
    flip(path, place_of(path, "data/0"))
    for keep in ("1", "2"):
        said = shell("prune", home, "--keep", keep, "--yes")
        assert said.code == 1 and f"{path}: " in said.err and "data/0" in said.err and "nothing was removed" in said.err
        assert names(home) == [1, 2, 3]
    assert shell("prune", home, "--keep", "3", "--yes").code == 0, "nothing goes anyway"


def test_a_best_one_whose_bytes_have_changed_is_none(shell: Shell, tmp_path: Path) -> None:
    """The next best stays instead; it stays itself, for somebody may bring its bytes back."""
    with ckpt.Checkpointer(tmp_path, keep=None, options=options()) as checkpointer:
        for step, loss in enumerate((0.3, 0.1, 0.2, 0.4, 0.5)):
            checkpointer.save(step, {"x": torch.full((3,), float(step))}, metrics={"loss": loss}).result()
    for step in (1, 2):
        path = step_in(tmp_path, step) / "state.pt"
        flip(path, place_of(path, "data/0"))
    words = ("prune", tmp_path, "--keep", "1", "--keep-best", "1", "--best-by", "loss")
    assert [each["step"] for each in shell.json(*words)["checkpoints"] if each["fate"] == "remove"] == [3, 2, 0]
    document = shell.json(*words, "--yes")
    assert [(each["step"], each["fate"]) for each in document["checkpoints"]] == [
        *((4, "keep"), (3, "remove"), (2, "held"), (1, "held"), (0, "keep")),
    ]
    assert names(tmp_path) == [0, 1, 2, 4]
    path = step_in(tmp_path, 0) / "state.pt"
    flip(path, place_of(path, "data/0"))
    said = shell("prune", tmp_path, "--keep", "1", "--keep-best", "1", "--best-by", "loss", "--yes")
    assert said.code == 0 and names(tmp_path) == [0, 1, 2, 4], "all that is left of the best"


NAMED = {
    **{"global_step1000": True, "global_step1500": False, "checkpoint-2000": True, "epoch=3-step=3000.ckpt": True},
    **{"step_4500": False, "5000": True, "best": None, "epoch=2-loss=0.1000.ckpt": None, "run2-best7": None},
}


def test_multiples_of_bundles_are_told_by_their_names(shell: Shell, tmp_path: Path) -> None:
    """A framework may not tell of steps. One whose step nobody knows stays."""
    with ckpt.BundleCheckpointer(options=options()) as bundles:
        for name in (*NAMED, "global_step9999"):
            bundle = bundles.begin(tmp_path, name, move_latest=False)
            bundle.save({"w": torch.zeros(2)}, tmp_path / name / "a.pt")
            bundle.commit().result()
    document = shell.json("prune", tmp_path, "--keep", "1", "--keep-every", "1000", "--yes")
    fates = {Path(each["path"]).name: each["fate"] for each in document["checkpoints"]}
    fate_of = {True: "keep", False: "remove", None: "held"}
    assert fates == {"global_step9999": "keep", **{name: fate_of[is_multiple] for name, is_multiple in NAMED.items()}}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        name for name, fate in fates.items() if fate != "remove"
    }


def test_only_what_would_go_takes_the_places_of_what_is_held(shell: Shell, tmp_path: Path) -> None:
    """Three are held at most, and these stay for another reason."""
    save_steps(tmp_path, 1, 10, 20, 30, 40)
    place = tmp_path / FOLDER / "store"
    place.mkdir(parents=True)
    (place / NAME).write_text(json.dumps({"decided": [], "held": [], "every_steps": None, "all_others": True}))
    document = shell.json("prune", tmp_path, "--keep", "1", "--keep-every", "10")
    assert [each["fate"] for each in document["checkpoints"]] == ["keep"] * 4 + ["held"]


def save_numbered(directory: Path, *numbers: int) -> None:
    """One job, that names them as accelerate does."""
    with ckpt.BundleCheckpointer(options=options()) as bundles:
        for number in numbers:
            bundle = bundles.begin(directory, f"checkpoints/checkpoint_{number}", step=number, named_last=True)
            bundle.save({"w": torch.zeros(2)}, bundle.directory / "a.pt")
            bundle.commit().result()


def test_bundles_whose_names_have_a_slash(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two jobs; the lock lies above them."""
    save_numbered(tmp_path, 0, 1, 2)
    save_numbered(tmp_path, 3)
    listed = [row["name"] for row in shell.json("list", tmp_path)["checkpoints"]]
    assert listed == [f"checkpoints/checkpoint_{number}" for number in (3, 2, 1, 0)]
    folder = tmp_path / "checkpoints"
    with in_use(tmp_path):
        assert shell("prune", folder, "--keep", "1", "--yes").code == shell("repair", folder, "--yes").code == 4
        monkeypatch.chdir(folder)
        assert shell("prune", ".", "--keep", "1", "--yes").code == shell("repair", ".", "--yes").code == 4
    (tmp_path / "latest").write_text("checkpoints/checkpoint_0")
    for at in (tmp_path, folder):
        document = shell.json("prune", at, "--keep", "3")
        assert [each["fate"] for each in document["checkpoints"]] == ["keep"] * 3 + ["held"], "latest names it"
    (tmp_path / "latest").unlink()
    assert shell("copy", tmp_path, tmp_path / "copied").code == 0
    assert shell.json("list", tmp_path / "copied")["checkpoints"] == shell.json("list", tmp_path)["checkpoints"]
    assert shell("prune", folder, "--keep", "3", "--yes").code == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint_{number}" for number in (1, 2, 3)]
    document = shell.json("prune", tmp_path, "--keep", "1", "--yes")
    assert [(each["step"], each["fate"]) for each in document["checkpoints"]] == [(3, "keep"), (2, "remove"), (1, "remove")]


@pytest.mark.usefixtures("native")
def test_a_bundle_whose_removal_was_interrupted_is_damaged(shell: Shell, tmp_path: Path) -> None:
    """And not taken for one that was saved without this library, and is whole."""
    save_numbered(tmp_path, 0, 1, 2)
    program = "from ckpt import _native; from ckpt.cli.main import main; _native.set_crash_point('removal-begun', 0); main()"
    words = [sys.executable, "-c", program, "prune", str(tmp_path), "--keep", "2", "--yes"]
    done = subprocess.run(words, env={"PYTHONPATH": PYTHONPATH}, timeout=patience(60))
    assert done.returncode == -signal.SIGKILL
    with ckpt.BundleCheckpointer(options=options()) as bundles, pytest.raises(CorruptError):
        bundles.find(tmp_path, "checkpoints/checkpoint_0")


def test_who_may_not_and_how_not(shell: Shell, home: Path, tmp_path: Path) -> None:
    with in_use(home):
        assert shell("prune", home, "--keep", "1", "--yes").code == shell("prune", home, "--keep", "1").code == 4
    assert names(home) == [1, 2, 3]
    for words in ((), ("--keep", "0"), ("--keep", "some")):
        assert shell("prune", home, *words).code == 2
    (tmp_path / "empty").mkdir()
    assert shell("prune", tmp_path / "empty", "--keep", "1").code == shell("prune", tmp_path / "none", "--keep", "1").code == 3
