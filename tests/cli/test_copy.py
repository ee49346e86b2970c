"""`ckpt copy`: what arrives is what was saved, whole or not at all, also behind a kill."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Shell, in_use, save_steps, state, step_in
from object_server import ObjectServer, options_for
from places import PYTHONPATH
from remote_jobs import RemoteJob
from support import assert_same, options, patience
from test_verify import flip, place_of

import ckpt
from ckpt.dcp import DcpCheckpointer
from ckpt.directory import manifest as manifests


def assert_arrived(directory: Path, *steps: int) -> None:
    with ckpt.Checkpointer(directory, options=options()) as checkpointer:
        assert checkpointer.steps() == list(steps)
        found = checkpointer.restore()
    assert found is not None and found.step == steps[-1]
    assert_same(found.state, state(steps[-1]))
    assert (directory / "latest").read_text() == f"step-{steps[-1]:012d}\n"


def test_a_whole_directory_and_again(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    document = shell.json("copy", three_steps, target)
    assert [each["state"] for each in document["checkpoints"]] == ["copied"] * 3 and document["left"] == 0
    assert_arrived(target, 1, 2, 3)
    assert "0 checkpoints of 0 B copied" in shell("copy", three_steps, target).out
    assert shell("verify", target).code == 0 and {path.name[:5] for path in target.iterdir()} == {"step-", "lates", ".lock"}


def test_one_and_older_ones_behind_it(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    assert shell("copy", step_in(three_steps, 2), tmp_path / "t").code == 0
    assert_arrived(tmp_path / "t", 2)
    assert shell("copy", step_in(three_steps, 1), tmp_path / "t").code == 0
    assert_arrived(tmp_path / "t", 1, 2)


def test_damage_is_not_copied(shell: Shell, home: Path, tmp_path: Path) -> None:
    path = step_in(home, 2) / "state.pt"
    flip(path, place_of(path, "data/0"))
    document = shell.json("copy", home, tmp_path / "t", code=5)
    assert [each["name"] for each in document["checkpoints"]] == ["step-000000000001"] and document["left"] == 2
    assert str(path) in document["error"]["message"]
    assert_arrived(tmp_path / "t", 1)


def test_what_cannot_be_understood_is_not_left_out_in_silence(
    shell: Shell, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (step_in(home, 2) / "manifest.json").write_text("{")
    assert shell("copy", home, tmp_path / "t").code == 0
    (said,) = caplog.messages
    assert f"'{step_in(home, 2)}' is left out" in said
    assert_arrived(tmp_path / "t", 1, 3)


def test_what_has_lost_files_is_not_there(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"
    assert shell("copy", three_steps, target).code == 0
    (step_in(target, 1) / "state.pt").unlink()
    said = shell("copy", three_steps, target)
    assert said.code == 5 and f"'{step_in(target, 1)}' is there, but" in said.out and "state.pt" in said.out
    shutil.rmtree(step_in(target, 1))
    with open(step_in(target, 2) / "state.pt", "ab") as file:
        file.write(b"x")
    assert shell("copy", three_steps, target).code == 5 and not step_in(target, 1).exists()
    shutil.rmtree(step_in(target, 2))
    assert shell("copy", three_steps, target).code == 0
    assert_arrived(target, 1, 2, 3)


def test_what_has_changed_since_is_not_there(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    """Its sizes are right."""
    target = tmp_path / "t"
    assert shell("copy", three_steps, target).code == 0
    path = step_in(target, 2) / "state.pt"
    flip(path, place_of(path, "data/0"))
    shutil.rmtree(step_in(target, 3))
    said = shell("copy", three_steps, target)
    assert said.code == 5 and f"'{step_in(target, 2)}' is there, but 'state.pt' record" in said.out and "data/0" in said.out
    assert not step_in(target, 3).exists()
    shutil.rmtree(step_in(target, 2))
    assert shell("copy", three_steps, target).code == 0
    assert_arrived(target, 1, 2, 3)


def test_a_copy_has_the_manifest_of_its_files(
    shell: Shell, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the step is saved again just when it has been read."""
    path, parse = step_in(home, 3) / manifests.NAME, manifests.parse
    before = path.read_bytes()
    (file,) = parse(before).files
    newer = dataclasses.replace(parse(before), sequence=9, files=(dataclasses.replace(file, name="state-2.pt"),))

    def saved_again(content: bytes) -> manifests.Manifest:
        if content == before:
            path.write_bytes(newer.to_json())
        return parse(content)

    monkeypatch.setattr(manifests, "parse", saved_again)
    assert shell("copy", step_in(home, 3), tmp_path / "t").code == 0
    monkeypatch.undo()
    assert shell("verify", tmp_path / "t").code == 0 and manifests.read(step_in(tmp_path / "t", 3)).files == (file,)


def test_what_would_be_confused_is_refused(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    save_steps(tmp_path / "same number", 9)
    save_steps(tmp_path / "same name", 3)
    for name, text in (("same number", "same number of commit"), ("same name", "is something else")):
        said = shell("copy", step_in(three_steps, 1 if name == "same number" else 3), tmp_path / name)
        assert said.code == 5 and text in said.out
    with in_use(tmp_path / "same name"):
        assert shell("copy", three_steps, tmp_path / "same name").code == 4
    assert shell("copy", tmp_path / "nothing", tmp_path / "t").code == 3


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("point", ["copied", "copy-complete"])
def test_killed_and_called_again(point: str, shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    program = f"from ckpt import _native; from ckpt.cli.main import main; _native.set_crash_point({point!r}, 1); main()"
    words = [sys.executable, "-c", program, "copy", str(three_steps), str(tmp_path / "t")]
    done = subprocess.run(words, env={"PYTHONPATH": PYTHONPATH}, timeout=patience(60))
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in shell.json("list", tmp_path / "t")["checkpoints"]] == [1]
    assert shell("copy", three_steps, tmp_path / "t").code == 0 and shell("repair", tmp_path / "t", "--yes").code == 0
    assert_arrived(tmp_path / "t", 1, 2, 3)
    assert not list((tmp_path / "t").rglob(".tmp*"))


def test_bundles(shell: Shell, tmp_path: Path) -> None:
    with ckpt.BundleCheckpointer(options=options()) as bundles:
        for number in range(2):
            bundle = bundles.begin(tmp_path / "s", f"global_step{number}", step=number, move_latest=number == 0)
            bundle.save({"w": number}, tmp_path / "s" / f"global_step{number}" / "a.pt")
            bundle.commit().result()
    assert shell("copy", tmp_path / "s", tmp_path / "t").code == 0
    assert (tmp_path / "t" / "latest").read_text() == "global_step0"
    for number in range(2):
        assert ckpt.load(tmp_path / "t" / f"global_step{number}" / "a.pt") == {"w": number}
    assert shell("verify", tmp_path / "t").code == shell("repair", tmp_path / "t").code == 0


def test_what_others_have_put_into_a_bundle_goes_with_it(shell: Shell, tmp_path: Path) -> None:
    """As a framework does: its own files, links, and directories, of which one is a sharded state with a manifest."""
    saved = tmp_path / "s" / "checkpoint-1"
    with ckpt.BundleCheckpointer(options=options()) as bundles, DcpCheckpointer(options=options()) as shards:
        bundle = bundles.begin(tmp_path / "s", saved.name, step=1)
        bundle.save({"w": 1}, saved / "optimizer.pt")
        bundle.follow(shards.save(saved / "model_0", {"w": torch.arange(3.0)}))
        (saved / "trainer_state.json").write_text("{}")
        (saved / "notes" / "more").mkdir(parents=True)
        (saved / "notes" / "more" / "a.txt").write_text("a")
        (saved / "newest.txt").symlink_to("notes/more/a.txt")
        bundle.commit().result()
    names = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.name != ".lock")
    assert shell("copy", tmp_path / "s", tmp_path / "t").code == 0
    copied = tmp_path / "t" / "checkpoint-1"
    assert sorted(str(path.relative_to(copied)) for path in copied.rglob("*")) == names
    assert (copied / "newest.txt").is_symlink() and (copied / "newest.txt").read_text() == "a"
    assert shell("verify", copied / "model_0").code == 0
    (data,) = (saved / "model_0").glob("*.distcp")
    flip(data, 100)
    said = shell("copy", tmp_path / "s", tmp_path / "u")
    assert said.code == 5 and "is damaged, and was not copied" in said.out
    assert not (tmp_path / "u" / "checkpoint-1").exists()


def test_from_an_object_store(
    shell: Shell, bucket: str, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = RemoteJob(tmp_path, bucket, server.port)
    for step in (1, 2):
        job.save(step)
        job.drain_well()
    for name, value in options_for(server.port).items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    rows = shell.json("list", job.url)["checkpoints"]
    assert [(row["step"], row["state"], row["kind"]) for row in rows] == [
        (2, "committed", "objects"),
        (1, "committed", "objects"),
    ]
    job.store.remove(f"{rows[1]['name']}/rank-00001-1.pt")
    assert [row["state"] for row in shell.json("list", job.url)["checkpoints"]] == ["committed", "damaged"]
    shutil.rmtree(job.home)
    said = shell("copy", job.url, tmp_path / "t")
    assert said.code == 5 and "rank-00001-1.pt" in said.out
    job.store.remove(f"{rows[1]['name']}/manifest.json")
    assert shell("copy", job.url, tmp_path / "t").code == shell("verify", tmp_path / "t").code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "t" / "step-000000000002").glob("*.pt")} == job.content[2]
