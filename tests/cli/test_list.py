"""`ckpt list` on directories of all kinds, whole, damaged and foreign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Shell, step_in, unname_manifest
from node_roots import Job
from places import PYTHONPATH
from support import options, patience

import ckpt
from ckpt.directory import late_names
from ckpt.drain import journal as journals


def states(document: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {row["name"]: row["state"] for row in document["checkpoints"]}


def test_newest_first_with_what_there_is_to_know(shell: Shell, three_steps: Path) -> None:
    rows = shell.json("list", three_steps)["checkpoints"]
    assert [(row["name"], row["step"], row["sequence"]) for row in rows] == [
        (f"step-{step:012d}", step, step) for step in (3, 2, 1)
    ]
    assert {row["state"] for row in rows} == {"committed"} and [row["latest"] for row in rows] == [True, False, False]
    size = sum(path.stat().st_size for path in step_in(three_steps, 3).glob("*.pt"))
    assert (rows[0]["bytes"], rows[0]["files"], rows[0]["world_size"]) == (size, 1, 1)
    said = shell("list", three_steps)
    assert said.code == 0 and said.out.splitlines()[1].split()[:3] == ["step-000000000003", "3", "3"]
    assert "committed, latest" in said.out and "\033" not in said.out and said.err == ""


def test_metrics_are_shown_where_there_are_any(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    assert "metrics" not in shell("list", three_steps).out and "metrics" not in shell("show", three_steps).out
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, {"x": 1}).result()
        checkpointer.save(2, {"x": 2}, metrics={"loss": 0.1234567890123, "top 1": 3}).result()
    rows = shell.json("list", tmp_path)["checkpoints"]
    assert [row["metrics"] for row in rows] == [{"loss": 0.1234567890123, "top 1": 3.0}, {}]
    assert shell.json("show", f"{tmp_path}:2")["manifest"]["metrics"] == rows[0]["metrics"]
    lines = shell("list", tmp_path).out.splitlines()
    assert lines[0].endswith("  metrics") and lines[1].endswith("  loss=0.123457, top 1=3") and lines[2].endswith("  -")
    assert "metrics: loss=0.123457, top 1=3" in shell("show", tmp_path).out.splitlines()


def test_what_removing_one_would_give_back(shell: Shell, home: Path) -> None:
    """Beside its size, where that is another: here a file has three names."""
    assert "frees" not in shell("list", home).out and "disk" not in shell("status", home).out
    assert all(row["frees"] == row["bytes"] for row in shell.json("list", home)["checkpoints"])
    for step in (1, 2):
        (step_in(home, step) / "state.pt").unlink()
        (step_in(home, step) / "state.pt").hardlink_to(step_in(home, 3) / "state.pt")
    rows = shell.json("list", home)["checkpoints"]
    assert all(row["frees"] < row["bytes"] / 2 for row in rows)
    assert shell.json("list", step_in(home, 2))["checkpoints"][0]["frees"] < rows[1]["bytes"] / 2
    lines = shell("list", home).out.splitlines()
    assert lines[0].split()[5:9] == ["size", "frees", "files", "ranks"]
    document = shell.json("status", home)
    assert document["bytes"] == sum(row["bytes"] for row in rows) > 1.5 * document["on_disk"]
    assert "of the disk" in shell("status", home).out


def test_one_checkpoint_is_listed_alone(shell: Shell, three_steps: Path) -> None:
    assert states(shell.json("list", step_in(three_steps, 2))) == {"step-000000000002": "committed"}


def test_what_is_wrong_is_said(shell: Shell, home: Path) -> None:
    (step_in(home, 1) / "manifest.json").write_text("{")
    os.truncate(step_in(home, 2) / "state.pt", 100)
    unname_manifest(step_in(home, 3))
    step_in(home, 4).mkdir()
    (step_in(home, 4) / ".tmp-state.pt-00000000-1-000000000").write_bytes(b"half")
    step_in(home, 5).mkdir()
    (step_in(home, 5) / "state.pt").write_bytes(b"whose?")
    (home / "notes").mkdir()
    document = shell.json("list", home, code=3)
    assert states(document) == {
        "step-000000000001": "damaged",
        "step-000000000002": "damaged",
        "step-000000000003": "prepared",
        "step-000000000004": "incomplete",
        "step-000000000005": "foreign",
    }
    problems = {row["step"]: row["problem"] for row in document["checkpoints"]}
    assert "missing or cut off: state.pt" in problems[2] and "repair" in problems[3]
    assert "is not a valid manifest" in shell("list", home).out or "cannot be read" in shell("list", home).out


@pytest.mark.parametrize("place", ["", "missing", "file"])
def test_nothing_there(place: str, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    said = shell("list", tmp_path / place)
    assert said.code == 3
    assert ("holds no checkpoint" in said.out) if place == "" else ("give the directory" in said.err or "not exist" in said.err)
    if place:
        error = shell.json("list", tmp_path / place, code=3)["error"]
        assert error["type"] == "NotACheckpointError" and str(tmp_path / place) in error["message"]


def test_bundles_also_those_that_wait_for_their_names(shell: Shell, tmp_path: Path) -> None:
    with ckpt.BundleCheckpointer(options=options()) as bundles:
        for name in ("global_step1", "deep/two", "global_step3"):
            bundle = bundles.begin(tmp_path, name)
            bundle.save({"w": torch.zeros(2)}, tmp_path / name / "mp_rank_00.pt")
            bundle.commit().result()
    (tmp_path / "global_step3").rename(late_names.partial_of(tmp_path, "global_step3"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".tmp-a.pt-00000000-1-000000000").write_bytes(b"half")
    document = shell.json("list", tmp_path)
    committed = dict.fromkeys(["global_step1", "deep/two", "global_step3"], "committed")
    assert states(document) == {**committed, "begun": "incomplete"}
    rows = {row["name"]: row for row in document["checkpoints"]}
    assert "repair" in rows["global_step3"]["problem"] and not rows["global_step1"]["problem"]
    assert {row["kind"] for row in rows.values()} == {"bundle"}


def test_a_node_and_what_has_become_of_it_at_home(shell: Shell, tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    saved = [job.save(step, common=500) for step in (1, 2)]
    sequence = saved[0].manifest.sequence
    journals.Journal(journals.path_of(job.roots[0], sequence), sequence, 1, 0, state=journals.SUPERSEDED).write()
    rows = shell.json("list", job.roots[0], "--tiers")["checkpoints"]
    assert [row["state"] for row in rows] == ["committed", "committed"], "the files of the other node are not missed"
    assert [row["where"] for row in rows] == [{"home": "not yet"}, {"home": "superseded"}]
    said = shell("list", job.roots[0].parent)
    assert said.code == 3 and str(job.roots[0]) in said.err


def test_as_a_user_types_it(three_steps: Path) -> None:
    words = [sys.executable, "-m", "ckpt", "list", "--json"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(words, cwd=three_steps, capture_output=True, text=True, timeout=patience(60), env=environment)
    assert (done.returncode, done.stderr) == (0, "") and len(json.loads(done.stdout)["checkpoints"]) == 3


WRONG = [((), "required: COMMAND"), (("paint",), "invalid choice"), (("list", "--no"), "--no")]


@pytest.mark.parametrize(("words", "text"), WRONG)
def test_wrong_usage(words: tuple[str, ...], text: str, shell: Shell) -> None:
    said = shell(*words)
    assert said.code == 2 and text in said.err and said.out == ""


def test_names_are_shown_and_not_obeyed(shell: Shell, tmp_path: Path) -> None:
    strange = tmp_path / "red\033[31m\n"
    strange.mkdir()
    (strange / "weights.pt").write_bytes(b"")
    said = shell("list", tmp_path)
    assert "\033" not in said.out and "red\\x1b[31m\\n" in said.out
