"""CheckpointCallback under DistributedDataParallel: two processes that are killed, resumed, preempted, and become one."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery, Ranks, nurseries_of_ranks
from places import TESTS
from support import DEADLINE_S, wait_until

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCRIPT = TESTS / "dist" / "ddp_training.py"
STEPS = 40

Log = list[dict[str, Any]]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2, optimizer=True) as made:
        yield made


def start(nurseries: list[Nursery], where: Path, name: str, *more: str) -> Ranks:
    return Ranks(nurseries, SCRIPT, f"--directory={where / 'saved'}", f"--events={where / name}", f"--steps={STEPS}", *more)


def events(where: Path, name: str, rank: int, kind: str | None = None) -> Log:
    log = where / f"{name}.{rank}"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if kind in (None, record["event"])]


def run(nurseries: list[Nursery], where: Path, name: str, *more: str) -> list[Log]:
    """Runs to the end; what each rank has logged."""
    ended = start(nurseries, where, name, *more).wait(2 * DEADLINE_S)
    assert [rank.returncode for rank in ended] == [0] * len(nurseries), "".join(rank.stderr for rank in ended)
    return [events(where, name, rank) for rank in range(len(nurseries))]


def interrupt(nurseries: list[Nursery], where: Path, after: int, number: signal.Signals, *more: str) -> list[Log]:
    """Sends the signal to rank 1 alone, once so many steps are done; what each rank has logged until all had ended."""
    ranks = start(nurseries, where, "interrupted", "--pause=0.03", *more)
    try:
        wait_until(lambda: len(events(where, "interrupted", 1, "step")) >= after or ranks.any_has_ended(), what="progress")
        ranks.children[1].signal(number)
    finally:
        ended = ranks.wait(2 * DEADLINE_S)
    assert all(rank.returncode != 0 for rank in ended), "it ended before the signal came"
    logs = [events(where, "interrupted", rank) for rank in range(2)]
    assert all(logs), "".join(rank.stderr for rank in ended)
    return logs


def steps_of(log: Log) -> Log:
    return [event for event in log if event["event"] == "step"]


def computed(event: dict[str, Any]) -> tuple[str, ...]:
    return event["loss"], event["same"], event["buffers"]


@pytest.fixture(scope="module")
def reference(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, dict[str, Any]]]:
    """For each rank what the uninterrupted run computed, by step."""
    logs = run(nurseries, tmp_path_factory.mktemp("reference"), "log", "--every=100ms")
    assert [event["saved"] for event in steps_of(logs[0])] == [event["saved"] for event in steps_of(logs[1])]
    by_step = [{event["step"]: event for event in log if "step" in event} for log in logs]
    assert all(by_step[0][step]["same"] == by_step[1][step]["same"] for step in range(STEPS + 1))
    assert by_step[0][STEPS]["buffers"] != by_step[1][STEPS]["buffers"]
    return by_step


@pytest.fixture(scope="module")
def killed(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Log]]:
    """A directory that two ranks have saved to when one was killed, and what they had logged."""
    where = tmp_path_factory.mktemp("killed")
    return where, interrupt(nurseries, where, 9, signal.SIGKILL)


def saved_weights(directory: Path) -> set[str]:
    """Names in the newest checkpoint, as stock torch reads it."""
    newest = directory / (directory / "latest").read_text().strip()
    (shared,) = newest.glob("replicated*.pt")
    return set(torch.load(shared, weights_only=True)["model"])


def test_killed_and_resumed_computes_the_same(
    nurseries: list[Nursery], killed: tuple[Path, list[Log]], reference: list[dict[int, dict[str, Any]]], tmp_path: Path
) -> None:
    directory, logs = killed
    shutil.copytree(directory / "saved", tmp_path / "saved")
    resumed = run(nurseries, tmp_path, "resumed")
    starts = [log[0]["step"] for log in resumed]
    assert starts[0] == starts[1]
    assert 1 <= starts[0] <= min(len(steps_of(log)) for log in logs) + 1
    for rank in range(2):
        for event in steps_of(logs[rank]) + steps_of(resumed[rank]):
            assert computed(event) == computed(reference[rank][event["step"]])
        assert [event["step"] for event in steps_of(resumed[rank])] == list(range(starts[rank] + 1, STEPS + 1))
    assert saved_weights(tmp_path / "saved") == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


def test_one_rank_resumes_two_and_two_resume_one(
    nurseries: list[Nursery], killed: tuple[Path, list[Log]], reference: list[dict[int, dict[str, Any]]], tmp_path: Path
) -> None:
    shutil.copytree(killed[0] / "saved", tmp_path / "saved")
    (alone,) = run(nurseries[:1], tmp_path, "alone")
    start = next(event for event in alone if event["event"] == "start")
    assert start["step"] >= 1
    for name in ("same", "buffers"):  # those of rank 0
        assert start[name] == reference[0][start["step"]][name]
    warnings = [event["text"] for event in alone if event["event"] == "logged"]
    assert any("saved by 2 rank(s), now there are 1: rank 0 goes on with the random numbers of rank 0" in w for w in warnings)
    assert any("give merge_data=" in w for w in warnings)

    last = steps_of(alone)[-1]
    both = run(nurseries, tmp_path, "both", f"--steps={STEPS + 2}")
    for log in both:
        again = next(event for event in log if event["event"] == "start")
        assert (again["step"], again["same"], again["buffers"]) == (STEPS, last["same"], last["buffers"])
        assert len(steps_of(log)) == 2
    assert steps_of(both[0])[-1]["same"] == steps_of(both[1])[-1]["same"]


def test_sigterm_to_one_rank_saves_the_same_step_on_all(nurseries: list[Nursery], tmp_path: Path) -> None:
    logs = interrupt(nurseries, tmp_path, 3, signal.SIGTERM, "--preemption", "--every=100000", "--steps=100000")
    said = [[event["text"] for event in log if event["event"] == "logged"][-1] for log in logs]
    done = steps_of(logs[1])[-1]["step"] + 1  # the one that was not logged any more
    assert all(text.startswith(f"SIGTERM: {done} steps are done and saved") for text in said), said
    assert logs[1][-1] == {"event": "preempted", "step": done}
    assert [path.name for path in (tmp_path / "saved").glob("step-*")] == [f"step-{done:012d}"]
