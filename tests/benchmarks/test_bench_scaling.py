"""The scaling benchmark with two ranks and tiny states: complete lines, a limit that holds, a picture. No speed is judged."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from support import patience

DEADLINE_S = patience(240.0)
RATE = 50_000_000
PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["--weak-bytes=2MiB", "--model-bytes=2MiB", "--compute-s=0.01", "--rounds=2", "--rest-s=0", "--arena=4MiB"]

WEAK = {"ckpt, own files", "torch.save + fsync, own files", "DCP save"}
STRONG = WEAK | {"ckpt, striped", "ckpt, rank 0 alone", "torch.save + fsync, rank 0 alone"}
BY_NODE = "own files, by way of the nodes"
EVERY_SIDE = {"rate_GBps", "durable_s", "blocked_s"}

Line = dict[str, Any]

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.slow]


def scaling(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.scaling.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scaling")


@pytest.fixture(scope="module")
def lines(place: Path) -> Iterator[list[Line]]:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler for the limit on a rank's rate")
    where = [f"--directory={place / 'files'}", f"--out={place / 'lines.jsonl'}", f"--plot={place / 'plot.png'}"]
    done = scaling("--ranks=1,2", "--rank-rate", f"{RATE}/s", *TINY, *where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from 1 to 2 ranks" in done.stdout
    yield lines_of(place / "lines.jsonl")


def test_every_side_is_measured_at_every_size(lines: list[Line]) -> None:
    for ranks in (1, 2):
        for kind, sides in (("weak", WEAK), ("strong", STRONG)):
            mine = [line for line in lines if (line["detail"]["ranks"], line["detail"]["kind"]) == (ranks, kind)]
            assert {line["detail"]["side"] for line in mine} == sides
            for side in sides:
                quantities = {line["quantity"] for line in mine if line["detail"]["side"] == side}
                assert quantities >= (EVERY_SIDE | {"commit_s", "slowest_flush_s"} if side.startswith("ckpt") else EVERY_SIDE)
    for line in lines:
        assert line["n"] == len(line["samples"]) == 2
        assert line["command"].startswith("python") and "--ranks=1,2" in line["command"]
        assert line["detail"]["rank_rate_bytes_per_s"] == RATE
        assert line["detail"]["nodes"] == 1
    names = [(line["case"], line["quantity"]) for line in lines]
    assert len(names) == len(set(names))


def test_bytes_grow_with_the_ranks_only_in_weak_scaling(lines: list[Line]) -> None:
    for kind, factor in (("weak", 2), ("strong", 1)):
        nbytes = {line["detail"]["ranks"]: line["bytes"] for line in lines if line["detail"]["kind"] == kind}
        assert nbytes[2] == factor * nbytes[1] > 0


def test_no_side_is_faster_than_the_limit(lines: list[Line]) -> None:
    """The last write of a file begins when all before it have been paid for, and so has it."""
    for line in lines:
        if line["quantity"] == "rate_GBps":
            writing = 1 if "rank 0 alone" in line["detail"]["side"] else line["detail"]["ranks"]
            assert 0 < line["max"] <= writing * RATE / 1e9, line["case"]


def test_what_is_said_of_the_slowest_holds_for_all(lines: list[Line]) -> None:
    by_case: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        by_case.setdefault(line["case"], {})[line["quantity"]] = line["samples"]
    for case, values in by_case.items():
        for at, durable_s in enumerate(values["durable_s"]):
            fastest, slowest = (values.get(f"{which}_flush_s", [0, 0])[at] for which in ("fastest", "slowest"))
            assert fastest <= slowest <= durable_s + 1e-3, case
            assert values["blocked_s"][at] > 0


def test_the_picture_is_one_and_nothing_else_is_left(lines: list[Line], place: Path) -> None:
    assert lines
    assert (place / "plot.png").read_bytes().startswith(PNG)
    assert os.listdir(place / "files") == []
    done = scaling("--from", str(place / "lines.jsonl"), "--plot", str(place / "again.png"))
    assert done.returncode == 0, done.stderr
    assert (place / "again.png").read_bytes().startswith(PNG)


def test_one_process_is_a_job_of_one(tmp_path: Path) -> None:
    out = tmp_path / "lines"
    done = scaling(*TINY, "--kinds=weak", "--rounds=1", f"--directory={tmp_path / 'files'}", f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["detail"]["ranks"] for line in lines_of(out)} == {1}


def test_jobs_of_mpirun(tmp_path: Path) -> None:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if importlib.util.find_spec("mpi4py") is None or shutil.which("mpirun", path=beside) is None:
        pytest.skip("there is no mpirun, or no mpi4py")
    out = tmp_path / "lines"
    where = [f"--directory={tmp_path / 'files'}", f"--out={out}"]
    done = scaling("--ranks=2", "--launcher=mpirun", "--kinds=strong", *TINY, "--rounds=1", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["detail"]["side"] for line in lines_of(out)} == STRONG
    assert {line["detail"]["ranks"] for line in lines_of(out)} == {2}


def test_by_way_of_the_nodes_it_is_durable_before_it_is_home(tmp_path: Path) -> None:
    out = tmp_path / "lines"
    where = [f"--directory={tmp_path / 'files'}", f"--node-tier={tmp_path / 'node'}", f"--out={out}"]
    done = scaling("--ranks=2", "--kinds=weak", *TINY, *where)
    assert done.returncode == 0, done.stdout + done.stderr
    mine = {line["quantity"]: line for line in lines_of(out) if line["detail"]["side"] == f"ckpt, {BY_NODE}"}
    assert mine.keys() >= EVERY_SIDE | {"home_s"}
    for on_node, at_home in zip(mine["durable_s"]["samples"], mine["home_s"]["samples"], strict=True):
        assert 0 < on_node < at_home
    others = [line for line in lines_of(out) if line["detail"]["side"] != f"ckpt, {BY_NODE}"]
    assert others and not [line for line in others if line["quantity"] == "home_s"]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    refused = scaling("--rank-rate=1MB/s")
    assert refused.returncode == 2 and "--ranks" in refused.stderr
    failed = scaling("--ranks=1", *TINY, "--kinds=weak", "--arena=1KiB", f"--directory={tmp_path}")
    assert failed.returncode != 0 and "arena_bytes" in failed.stderr, "a job that fails says why"


def test_the_limit_of_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.measure import rate_limit

    assert rate_limit.parse_rate("200MB/s") == 200_000_000
    assert rate_limit.parse_rate("1GiB/s") == 1 << 30
    for text in ("0", "fast", "-1MB/s"):
        with pytest.raises(ValueError, match="rate"):
            rate_limit.parse_rate(text)
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler")
    program = (
        "import os, sys, time\n"
        "f = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT); b = bytes(250_000); t = time.monotonic()\n"
        "assert os.write(f, b) == os.pwrite(f, b, 0) == os.pwritev(f, [b], 0) == os.writev(f, [b]) == len(b)\n"
        "s = time.monotonic() - t\n"
        "os.write(os.pipe()[1], bytes(4096)); print(s)\n"
    )
    environment = rate_limit.limited(os.environ, 2_000_000, tmp_path)
    started = time.monotonic()
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert 0.5 <= float(done.stdout) < time.monotonic() - started, (
        "a million bytes at two million a second, whoever writes them"
    )
    assert (tmp_path / "file").stat().st_size == 500_000
