"""The name of a run: chosen once, whoever chooses it, and never half there."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from node_roots import Job
from places import PYTHONPATH
from support import patience

from ckpt.directory.run_file import find_run
from ckpt.drain import node as nodes
from ckpt.drain.home import Home
from ckpt.errors import CheckpointError, NotACheckpointError, StorageError
from ckpt.tiers.run_id import highest_on_its_way, make_run


def test_it_is_made_once_and_stays(tmp_path: Path) -> None:
    assert find_run(tmp_path) is None and find_run(tmp_path / "absent") is None
    run = make_run(tmp_path)
    assert len(run) == 16 and int(run, 16) >= 0
    assert make_run(tmp_path) == find_run(tmp_path) == run
    assert [path.name for path in tmp_path.iterdir()] == [".run"]
    (tmp_path / "other").mkdir()
    assert make_run(tmp_path / "other") != run


def test_the_drain_takes_it_for_its_own(tmp_path: Path) -> None:
    job = Job(tmp_path)
    (job.home / ".run").unlink()
    job.describe(0, run=make_run(job.home))
    Home(nodes.read(job.roots[0])).expect_ours()
    job.describe(0, run="another")
    with pytest.raises(CheckpointError, match="home of the run"):
        Home(nodes.read(job.roots[0])).expect_ours()
    (job.home / ".run").unlink()
    with pytest.raises(StorageError, match="is the file system mounted") as raised:
        Home(nodes.read(job.roots[0])).expect_ours()
    assert raised.value.errno == errno.ENOENT, "which may pass"


MAKE = """
import sys; from pathlib import Path; from ckpt.tiers.run_id import make_run
sys.stdin.read(1)
print(make_run(Path(sys.argv[1])))
"""


def test_processes_that_make_it_at_once_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": PYTHONPATH})
        for _ in range(4)
    ]
    runs = {process.communicate("x", timeout=patience(60))[0].strip() for process in started}
    assert runs == {find_run(tmp_path)}
    assert [path.name for path in tmp_path.iterdir()] == [".run"]


@pytest.mark.parametrize(("point", "made"), [("run-written", False), ("run-named", True)])
def test_a_crash_leaves_all_of_it_or_nothing(point: str, made: bool, tmp_path: Path, native: Any) -> None:
    crash = f"from ckpt import _native; _native.set_crash_point({point!r}, 0){MAKE}"
    done = subprocess.run(
        [sys.executable, "-c", crash, str(tmp_path)], input=b"x", env={"PYTHONPATH": PYTHONPATH}, timeout=patience(60)
    )
    assert done.returncode != 0
    found = find_run(tmp_path)
    assert (found is not None) == made
    run = make_run(tmp_path)
    assert found in (None, run)
    assert [path.name for path in tmp_path.iterdir()] == [".run"], "what the crash has left is gone"


@pytest.mark.parametrize("content", ["", "{}", "[]", "7", '{"run": ""}', '{"run": "../a"}', '{"run": 7}', '{"run": ".."}'])
def test_what_names_no_run_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / ".run").write_text(content)
    for call in (find_run, make_run):
        with pytest.raises(NotACheckpointError, match=r"names no run .* Write it anew"):
            call(tmp_path)
    assert (tmp_path / ".run").read_text() == content


def test_an_error_says_what_was_done(tmp_path: Path, native: Any) -> None:
    native.set_fault("open", ".run", error=28)
    with pytest.raises(StorageError) as raised:
        make_run(tmp_path)
    assert raised.value.errno == 28 and list(tmp_path.iterdir()) == []


def test_numbers_that_are_on_their_way_are_known(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert highest_on_its_way(tmp_path, run) == -1
    for name in ("000000000007", "000000000012", ".tmp-x"):
        (tmp_path / ".drain" / run / name).mkdir(parents=True)
    assert highest_on_its_way(tmp_path, run) == 12
    assert json.loads((tmp_path / ".run").read_text()) == {"run": run}
