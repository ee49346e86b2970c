"""Commands as programs of their own: exit codes, documents, help, and progress on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from command_line import Shell, in_use, step_in
from node_roots import Job, run_program
from places import PYTHONPATH
from support import patience
from test_verify import flip, place_of

from ckpt.cli.main import COMMANDS
from ckpt.drain import node as nodes
from ckpt.storage.directory_lock import DirectoryLock

ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH}


def typed(directory: Path, *words: str, prepare: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", f"import sys; {prepare}; from ckpt.cli.main import main; sys.exit(main())"] if prepare else ["-m", "ckpt"]
    return subprocess.run(
        [sys.executable, *program, *words], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=patience(60)
    )


# By what is in the directory of the test: "home", three steps; "bad", the same with a damaged step 2; "empty".
ANSWERS = {
    "show home:2": 0,
    "verify bad": 1,
    "diff home:1 home:1": 0,
    "prune home --keep 1": 0,
    "repair home": 0,
    "status home --stale 0.001s": 6,
    "copy bad copies/some": 5,
    "doctor empty --size 4KiB": 0,
    "drain empty": 3,
    "prune home": 2,
}


def test_each_answer_has_its_code_and_is_one_document(home: Path, tmp_path: Path) -> None:
    bad = home.with_name("bad")
    subprocess.run(["cp", "-r", str(home), str(bad)], check=True)
    flip(step_in(bad, 2) / "state.pt", place_of(step_in(bad, 2) / "state.pt", "data/0"))
    for name in ("empty", "copies"):
        (tmp_path / name).mkdir()
    for line, code in ANSWERS.items():
        done = typed(tmp_path, *line.split(), "--json")
        assert done.returncode == code, f"{line}: {done.stdout}{done.stderr}"
        if code == 2:
            assert done.stdout == "" and "usage: ckpt" in done.stderr
            continue
        document = json.loads(done.stdout)
        assert (document["schema"], document["command"]) == (1, line.split()[0])
        assert ("error" in document) == (bool(done.stderr) or "bad copies" in line), line
    with in_use(home):
        assert typed(tmp_path, "prune", "home", "--keep", "1", "--yes").returncode == 4


def test_help_names_each_command_and_each_takes_json(shell: Shell) -> None:
    said = shell("--help").out
    assert all(f"\n    {name} " in said for name in COMMANDS) and "exit codes" in said
    for name in COMMANDS:
        assert "--json" in shell(name, "--help").out


# ---- drain -----------------------------------------------------------------------------------------------------------


def document_of(job: Job, code: int, *words: str) -> dict[str, Any]:
    ended = run_program(job.roots[0], *words, "--json")
    assert ended.returncode == code, ended.stderr
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def test_a_drain_answers_at_its_end(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    document = document_of(job, 0, "--once")
    assert document["command"] == "drain" and document["good"] and document["root"] == str(job.roots[0])
    assert [(each["step"], each["state"]) for each in document["checkpoints"]] == [(1, "committed")]
    job.save(2)
    (job.home / ".run").rename(job.home / ".away")
    document = document_of(job, 5, "--once")
    assert not document["good"] and document["checkpoints"][0]["step"] == 2
    lock = DirectoryLock(job.roots[0], name=nodes.LOCK)
    lock.acquire()
    try:
        assert document_of(job, 4)["error"]["type"] == "InUseError"
    finally:
        lock.release()


# ---- on a terminal ---------------------------------------------------------------------------------------------------


def on_terminal(directory: Path, *words: str, prepare: str = "pass") -> str:
    """What comes to standard error if that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = f"import sys; {prepare}; from ckpt.cli.main import main; sys.exit(main())"
    words = (sys.executable, "-c", program, *words)
    with subprocess.Popen(words, cwd=directory, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
        except OSError:  # the other end is closed
            pass
        finally:
            os.close(ours)
        assert process.wait(patience(60)) == 0, said
    return said.decode()


def test_progress_is_for_terminals_and_for_who_has_tqdm(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    for words, name in ((("verify", "home"), "verified"), (("copy", "home", "t"), "copied")):
        said = on_terminal(tmp_path, *words)
        assert name in said and "%" in said
    assert on_terminal(tmp_path, "verify", "home", prepare="sys.modules['tqdm'] = None") == ""
    assert typed(tmp_path, "verify", "home").stderr == ""
