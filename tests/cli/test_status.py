"""`ckpt status`: who saves, the last commit and its age, and what is left to be carried on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from command_line import Shell, in_use, step_in
from node_roots import Job

from ckpt.directory import manifest as manifests
from ckpt.drain import journal as journals


def test_a_directory_at_rest_and_one_in_use(shell: Shell, home: Path) -> None:
    document = shell.json("status", home)
    assert document["holder"] is None and document["committed"] == 3 and document["newest"]["step"] == 3
    assert 0 <= document["age_s"] < 3600 and not document["stale"] and document["in_flight"] == []
    step_in(home, 4).mkdir()
    (step_in(home, 4) / ".tmp-state.pt-00000000-1-000000000").write_bytes(b"half")
    assert "left by a crash" in shell("status", home).out
    with in_use(home):
        said = shell("status", home)
        assert "job: process 1 on elsewhere" in said.out and "in flight: step-000000000004" in said.out


def test_stale(shell: Shell, home: Path) -> None:
    path = step_in(home, 3) / "manifest.json"
    said = json.loads(path.read_bytes())
    del said["crc32"]
    path.write_bytes(manifests.with_checksum({**said, "created": "2020-01-01T00:00:00.000+00:00"}))
    assert shell("status", home).code == shell("status", home, "--stale", "100000d").code == 0
    assert shell.json("status", home, "--stale", "30min", code=6)["stale"]
    assert "(stale)" in shell("status", home, "--stale", "30min").out


def test_a_commit_that_is_to_come_by_this_clock_is_stale(shell: Shell, home: Path) -> None:
    """A clock was ahead, and has gone back: nobody can tell how old it is, and it must not pass for new for years."""
    path = step_in(home, 3) / "manifest.json"
    said = json.loads(path.read_bytes())
    del said["crc32"]
    path.write_bytes(manifests.with_checksum({**said, "created": "2200-01-01T00:00:00.000+00:00"}))
    assert "from now, by this clock" in shell("status", home).out
    assert shell.json("status", home, "--stale", "30min", code=6)["stale"]


def test_the_backlog_of_a_node(shell: Shell, tmp_path: Path) -> None:
    job = Job(tmp_path)
    for state, number in ((journals.COMMITTED, 1), (journals.COPYING, 2), (journals.FAILED, 3)):
        job.save(number)
        journal = journals.Journal(
            journals.path_of(job.roots[0], number), number, number, 0, state=state, total=1000, bytes=400
        )
        journal.next, journal.rate, journal.text = time.time(), 5000.0, "no space at home"
        journal.write()
    (backlog,) = shell.json("status", job.roots[0])["backlogs"]
    assert (backlog["target"], backlog["pending"], backlog["bytes"], backlog["failed"]) == (str(job.home), 2, 1200, 1)
    assert not backlog["running"] and backlog["rate"] == 5000.0
    said = shell("status", job.roots[0])
    assert "no drain is running" in said.out and "no space at home" in said.out


def test_files_that_are_checkpoints_by_themselves(shell: Shell, tmp_path: Path) -> None:
    """As Lightning and torch.save write them: there is no commit of these."""
    for age_s, name in ((7200, "epoch=0.ckpt"), (3600, "epoch=1.ckpt"), (60, "notes.txt"), (60, ".hidden.pt")):
        torch.save({"w": torch.zeros(3)}, tmp_path / name)
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    said = shell("status", tmp_path)
    assert said.code == 0 and "last file: epoch=1.ckpt" in said.out and "60 min ago" in said.out
    assert "none" not in said.out.splitlines()[1] and "files: 2, " in said.out
    document = shell.json("status", tmp_path)
    assert document["newest"] is None and (document["files"]["count"], document["files"]["newest"]) == (2, "epoch=1.ckpt")
    assert 3600 <= document["age_s"] < 7200
    assert shell("status", tmp_path, "--stale", "30min").code == 6 and shell("status", tmp_path, "--stale", "5h").code == 0


def test_watch_says_it_again_until_interrupted(shell: Shell, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[float] = []

    def interrupted(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("ckpt.cli.status.time.sleep", interrupted)
    said = shell("status", home, "--watch")
    assert said.code == 130 and said.out.count("last commit") == 2


def test_nothing_there(shell: Shell, tmp_path: Path) -> None:
    assert shell("status", tmp_path).code == shell("status", tmp_path / "missing").code == 3
    assert shell("status", tmp_path, "--stale", "soon").code == 2
