"""CheckpointCallback under DistributedDataParallel: two processes that are killed, resumed, preempted, and become one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import TESTS
from support import DEADLINE_S, wait_until

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCRIPT = TESTS / "dist" / "ddp_training.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
STEPS = 40

Log = list[dict[str, Any]]


def command(ranks: int, where: Path, name: str, *more: str) -> list[str]:
    start = TORCHRUN if ranks == 2 else [sys.executable]
    return [*start, str(SCRIPT), f"--directory={where / 'saved'}", f"--events={where / name}", f"--steps={STEPS}", *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def events(where: Path, name: str, rank: int, kind: str | None = None) -> Log:
    log = where / f"{name}.{rank}"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if kind in (None, record["event"])]


def run(ranks: int, where: Path, name: str, *more: str) -> list[Log]:
    """Runs to the end; what each rank has logged."""
    done = subprocess.run(
        command(ranks, where, name, *more), capture_output=True, text=True, timeout=2 * DEADLINE_S, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return [events(where, name, rank) for rank in range(ranks)]


def interrupt(where: Path, after: int, number: signal.Signals, *more: str) -> list[Log]:
    """Sends the signal to rank 1 alone, once so many steps are done; what each rank has logged until all had ended."""
    launcher = subprocess.Popen(
        command(2, where, "interrupted", "--pause=0.03", *more),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: len(events(where, "interrupted", 1, "step")) >= after or launcher.poll() is not None, what="progress"
        )
        if launcher.poll() is None:
            os.kill(events(where, "interrupted", 1, "start")[0]["pid"], number)
        _, text = launcher.communicate(timeout=2 * DEADLINE_S)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    assert launcher.returncode != 0, "it ended before the signal came"
    logs = [events(where, "interrupted", rank) for rank in range(2)]
    assert all(logs), text
    return logs


def steps_of(log: Log) -> Log:
    return [event for event in log if event["event"] == "step"]


def computed(event: dict[str, Any]) -> tuple[str, ...]:
    return event["loss"], event["same"], event["buffers"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, dict[str, Any]]]:
    """For each rank what the uninterrupted run computed, by step."""
    logs = run(2, tmp_path_factory.mktemp("reference"), "log", "--every=100ms")
    assert [event["saved"] for event in steps_of(logs[0])] == [event["saved"] for event in steps_of(logs[1])]
    by_step = [{event["step"]: event for event in log if "step" in event} for log in logs]
    assert all(by_step[0][step]["same"] == by_step[1][step]["same"] for step in range(STEPS + 1))
    assert by_step[0][STEPS]["buffers"] != by_step[1][STEPS]["buffers"]
    return by_step


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Log]]:
    """A directory that two ranks have saved to when one was killed, and what they had logged."""
    where = tmp_path_factory.mktemp("killed")
    return where, interrupt(where, 9, signal.SIGKILL)


def saved_weights(directory: Path) -> set[str]:
    """Names in the newest checkpoint, as stock torch reads it."""
    newest = directory / (directory / "latest").read_text().strip()
    (shared,) = newest.glob("replicated*.pt")
    return set(torch.load(shared, weights_only=True)["model"])


def test_killed_and_resumed_computes_the_same(
    killed: tuple[Path, list[Log]], reference: list[dict[int, dict[str, Any]]], tmp_path: Path
) -> None:
    directory, logs = killed
    shutil.copytree(directory / "saved", tmp_path / "saved")
    resumed = run(2, tmp_path, "resumed")
    starts = [log[0]["step"] for log in resumed]
    assert starts[0] == starts[1]
    assert 1 <= starts[0] <= min(len(steps_of(log)) for log in logs) + 1
    for rank in range(2):
        for event in steps_of(logs[rank]) + steps_of(resumed[rank]):
            assert computed(event) == computed(reference[rank][event["step"]])
        assert [event["step"] for event in steps_of(resumed[rank])] == list(range(starts[rank] + 1, STEPS + 1))
    assert saved_weights(tmp_path / "saved") == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.slow
def test_one_rank_resumes_two_and_two_resume_one(
    killed: tuple[Path, list[Log]], reference: list[dict[int, dict[str, Any]]], tmp_path: Path
) -> None:
    shutil.copytree(killed[0] / "saved", tmp_path / "saved")
    (alone,) = run(1, tmp_path, "alone")
    start = next(event for event in alone if event["event"] == "start")
    assert start["step"] >= 1
    for name in ("same", "buffers"):  # those of rank 0
        assert start[name] == reference[0][start["step"]][name]
    warnings = [event["text"] for event in alone if event["event"] == "logged"]
    assert any("saved by 2 rank(s), now there are 1: rank 0 goes on with the random numbers of rank 0" in w for w in warnings)
    assert any("give merge_data=" in w for w in warnings)

    last = steps_of(alone)[-1]
    both = run(2, tmp_path, "both", f"--steps={STEPS + 2}")
    for log in both:
        again = next(event for event in log if event["event"] == "start")
        assert (again["step"], again["same"], again["buffers"]) == (STEPS, last["same"], last["buffers"])
        assert len(steps_of(log)) == 2
    assert steps_of(both[0])[-1]["same"] == steps_of(both[1])[-1]["same"]


def test_sigterm_to_one_rank_saves_the_same_step_on_all(tmp_path: Path) -> None:
    logs = interrupt(tmp_path, 3, signal.SIGTERM, "--preemption", "--every=100000", "--steps=100000")
    said = [[event["text"] for event in log if event["event"] == "logged"][-1] for log in logs]
    done = steps_of(logs[1])[-1]["step"] + 1  # the one that was not logged any more
    assert all(text.startswith(f"SIGTERM: {done} steps are done and saved") for text in said), said
    assert logs[1][-1] == {"event": "preempted", "step": done}
    assert [path.name for path in (tmp_path / "saved").glob("step-*")] == [f"step-{done:012d}"]
