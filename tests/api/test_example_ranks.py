"""The example on two ranks, as torchrun and mpirun launch it: one rank is killed, all are resumed, and nothing has changed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from places import ROOT
from support import patience

pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCRIPT = ROOT / "examples" / "train_gpt.py"
TINY = ["--layers=2", "--heads=2", "--width=64", "--context=32", "--batch=4", "--threads=1", "--iterations=30"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "mpirun": [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
}
ALONE = {"alone": [sys.executable]}
RANK_VARIABLES = {"torchrun": "RANK", "mpirun": "OMPI_COMM_WORLD_RANK"}
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI", "PMIX", "PRTE")
DEADLINE_S = patience(60.0)

Record = dict[str, Any]


def need(launcher: str) -> None:
    if launcher == "mpirun" and importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    if launcher == "mpirun" and MPIRUN is None:
        pytest.skip("there is no mpirun")


def launch(launcher: str, where: Path, name: str, *more: str) -> subprocess.Popen[str]:
    flags = [*TINY, f"--directory={where / 'saved'}", f"--events={where / name}", *more]
    command = [*(LAUNCHERS | ALONE)[launcher], str(SCRIPT), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(launcher: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed; at the deadline, or when the test is interrupted, it is ended with all that it has started."""
    try:
        return launcher.communicate(timeout=DEADLINE_S)
    finally:
        if launcher.poll() is None:
            for child in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                child.kill()
            launcher.communicate()


def run(launcher: str, where: Path, name: str, *more: str) -> list[Record]:
    program = launch(launcher, where, name, *more)
    output, errors = finish(program)
    assert program.returncode == 0, errors
    records = events(where / name)
    assert output.count("final state") == 1, "rank 0 alone prints"
    assert records[-1]["digest"] in output
    return records


def events(log: Path) -> list[Record]:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_once_saved(launcher: str, where: Path, saves: int, *more: str, ranks: tuple[int, ...] = (1,)) -> list[Record]:
    """SIGKILL for these ranks when so many saves are durable; what rank 0 had logged when all had ended."""
    program = launch(launcher, where, "killed", *more)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while [e["event"] for e in events(where / "killed")].count("save") < saves and program.poll() is None:
            assert time.monotonic() < deadline, "the run to be killed makes no progress"
            time.sleep(0.001)
        if program.poll() is None:
            for process in [processes_of_ranks(launcher, program.pid)[rank] for rank in ranks]:
                process.kill()
    finally:
        _, errors = finish(program)
    records = events(where / "killed")
    assert program.returncode != 0, "it ended before it could be killed"
    assert records and records[-1]["event"] != "end", errors
    return records


def processes_of_ranks(launcher: str, pid: int) -> dict[int, psutil.Process]:
    if launcher in ALONE:
        return {0: psutil.Process(pid)}
    children = psutil.Process(pid).children(recursive=True)
    ranks = [(child.environ().get(RANK_VARIABLES[launcher]), child) for child in children]
    return {int(rank): child for rank, child in ranks if rank is not None}


def losses(records: list[Record]) -> dict[int, str]:
    return {record["step"]: record["loss_hex"] for record in records if record["event"] == "iteration"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Uninterrupted, without a single save."""
    return run("torchrun", tmp_path_factory.mktemp("reference"), "log", "--engine=none")


def assert_went_on(reference: list[Record], killed: list[Record], resumed: list[Record], *, saved: int) -> None:
    """Bit for bit as if nothing had been killed, from a save on that is no older than this."""
    expected, start = losses(reference), resumed[0]["resumed_from"]
    assert saved <= start <= len(losses(killed)) + 1
    assert list(losses(resumed)) == list(range(start + 1, len(expected) + 1))
    assert losses(killed).items() <= expected.items()
    assert losses(resumed).items() <= expected.items()
    assert resumed[-1]["digest"] == reference[-1]["digest"]
    assert not [record for record in resumed if record.get("error")]


@pytest.mark.parametrize(
    "launcher", [pytest.param(each, marks=pytest.mark.slow if each == "mpirun" else ()) for each in LAUNCHERS]
)
def test_a_rank_is_killed_and_all_resume(launcher: str, reference: list[Record], tmp_path: Path) -> None:
    need(launcher)
    killed = kill_once_saved(launcher, tmp_path, 5)
    resumed = run(launcher, tmp_path, "resumed", "--resume")
    assert_went_on(reference, killed, resumed, saved=5)
