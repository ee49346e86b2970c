"""The process that carries checkpoints home: how it is started, whose child it is, and what it takes along."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import psutil
import pytest
from node_roots import Job, wait_for
from support import Resources
from tier_places import ending, has_ended, kill, trained_job

from ckpt.tiers.drain_process import LOG, DrainProcess


def test_it_carries_checkpoints_home_and_ends_with_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path)  # whose processes are gone
    job.save(1)
    with ending(DrainProcess(job.roots[0])) as drain:
        assert drain.ensure() == ""
        wait_for(lambda: has_ended(drain.pid))
    job.assert_home_is_right()
    assert job.steps_at_home() == [1] and job.state(1) == "committed"


def test_it_is_nobodys_child_and_has_nothing_of_its_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaks_nothing: Resources
) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "__init__.py").write_text("raise RuntimeError('another ckpt')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    kept_open = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(kept_open, True)
    job = trained_job(tmp_path)
    others = set(psutil.Process().children())  # that other tests have left waiting for more
    try:
        with ending(DrainProcess(job.roots[0])) as drain:
            assert drain.ensure() == ""
            wait_for(lambda: (job.roots[0] / ".drain.lock").exists())
            process = psutil.Process(drain.pid)
            assert process.cmdline() == [sys.executable, "-m", "ckpt", "drain", str(job.roots[0])]
            assert process.ppid() != os.getpid() and set(psutil.Process().children()) <= others
            assert os.getsid(drain.pid) == os.getpgid(drain.pid) == drain.pid
            assert process.cwd() == "/"
            log = job.roots[0] / LOG
            opened = {number: os.readlink(f"/proc/{drain.pid}/fd/{number}") for number in (0, 1, 2)}
            assert opened == {0: os.devnull, 1: str(log), 2: str(log)}
            everything = {os.readlink(entry) for entry in Path(f"/proc/{drain.pid}/fd").iterdir()}
            assert str(tmp_path) not in everything
            assert "torch" not in Path(f"/proc/{drain.pid}/maps").read_text()
    finally:
        os.close(kept_open)


def test_one_is_enough_whoever_has_started_it(tmp_path: Path) -> None:
    job = trained_job(tmp_path)
    job.save(1)
    with ending(DrainProcess(job.roots[0])) as drain:
        assert not drain.runs() and drain.ensure() == ""
        pid = drain.pid
        assert drain.runs() and drain.ensure() == "" and drain.pid == pid, "it has just been started"
        wait_for(lambda: job.state(1) == "committed")
        other = DrainProcess(job.roots[0])
        assert other.runs() and other.ensure() == "" and other.pid == 0


def test_it_is_started_again_once_it_has_ended(tmp_path: Path) -> None:
    job = trained_job(tmp_path)
    with ending(DrainProcess(job.roots[0])) as drain:
        drain.ensure()
        first = drain.pid
        kill(first)
        assert not drain.runs() and drain.ensure() == "" and drain.pid != first
        job.save(1)
        wait_for(lambda: job.state(1) == "committed")


def test_its_log_is_appended_to_and_bounded(tmp_path: Path) -> None:
    job = trained_job(tmp_path)
    log = job.roots[0] / LOG
    log.write_text("before\n")
    with ending(DrainProcess(job.roots[0])) as drain:
        (job.roots[0] / "node.json").write_text("no description")
        assert drain.ensure() == ""
        wait_for(lambda: has_ended(drain.pid))
        assert log.read_text().startswith("before\n") and "does not describe a node" in drain.last_words()
        log.write_bytes(b"x" * (1 << 20))
        drain.ensure()
        wait_for(lambda: has_ended(drain.pid))
        assert log.stat().st_size > 1 << 20
        drain.ensure()
        wait_for(lambda: has_ended(drain.pid))
        assert 0 < log.stat().st_size < 10_000 and "does not describe a node" in drain.last_words()


def test_what_is_in_the_way_is_told_once_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trained_job(tmp_path)
    (job.roots[0] / LOG).mkdir()
    drain = DrainProcess(job.roots[0])
    with caplog.at_level(logging.WARNING, "ckpt"):
        assert "Is a directory" in drain.ensure() and "Is a directory" in drain.ensure()
    assert len(caplog.records) == 1 and str(job.roots[0]) in caplog.text
    (job.roots[0] / LOG).rmdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    assert "no-python" in drain.ensure() and not drain.runs()
    monkeypatch.setattr(sys, "executable", "")
    assert "python -m ckpt drain" in drain.ensure()
    assert DrainProcess(tmp_path / "nowhere").ensure() != ""
