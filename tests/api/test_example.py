"""The example that users copy: killed and resumed it must end in the very same state."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Child, Nursery, script, shared_nursery
from places import ROOT
from support import patience, wait_until

pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

SCRIPT = ROOT / "examples" / "train_gpt.py"
TINY = ["--layers=2", "--heads=2", "--width=64", "--context=32", "--batch=4", "--threads=1"]
ITERATIONS = 100
DEADLINE_S = patience(60.0)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with shared_nursery(optimizer=True) as made:
        yield made


def start(nursery: Nursery, engine: str, where: Path, name: str, *more: str) -> Child:
    flags = [f"--engine={engine}", f"--directory={where / engine}", f"--events={where / name}"]
    return nursery.start(script(SCRIPT, *TINY, f"--iterations={ITERATIONS}", *flags, *more))


def run(nursery: Nursery, engine: str, where: Path, name: str, *more: str) -> list[dict[str, Any]]:
    done = start(nursery, engine, where, name, *more).wait(DEADLINE_S)
    assert done.returncode == 0, done.stderr
    records = events(where / name)
    assert records[-1]["digest"] in done.stdout
    return records


def events(log: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [r for r in records if kind in (None, r["event"])]


def kill_once_saved(nursery: Nursery, engine: str, where: Path, saves: int) -> int:
    """SIGKILL a run once so many saves are durable; returns the iterations that it had done."""
    child, log = start(nursery, engine, where, "killed"), where / "killed"
    try:
        wait_until(lambda: len(events(log, "save")) >= saves or child.ends_within(0), DEADLINE_S, "progress")
        child.signal(signal.SIGKILL)
    finally:
        ended = child.wait(DEADLINE_S)
    assert ended.returncode == -signal.SIGKILL, f"it ended before it could be killed: {ended.stderr}"
    return len(events(log, "iteration"))


@pytest.fixture(scope="module")
def reference(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(nursery, "none", tmp_path_factory.mktemp("example"), "reference")


@pytest.mark.parametrize("engine", ["lazy", pytest.param("torch", marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_in_the_same_state(
    engine: str, nursery: Nursery, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    killed_after = kill_once_saved(nursery, engine, tmp_path, saves=5)
    resumed = run(nursery, engine, tmp_path, "resumed", "--resume")

    start, end = resumed[0], resumed[-1]
    assert 5 <= start["resumed_from"] <= killed_after + 1
    assert end["digest"] == reference[-1]["digest"]
    losses = {r["step"]: r["loss_hex"] for r in reference if r["event"] == "iteration"}
    for record in events(tmp_path / "killed", "iteration") + resumed[1:]:
        if record["event"] == "iteration":
            assert record["loss_hex"] == losses[record["step"]]


def test_own_text_rare_saves_and_final_model(nursery: Nursery, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    final = tmp_path / "final.pt"
    records = run(nursery, "lazy", tmp_path, "own", f"--text={text}", "--save-every=7", f"--final={final}")
    saved = [r["step"] for r in records if r["event"] == "save"]
    assert saved == [*range(7, ITERATIONS, 7), ITERATIONS]
    losses = [r["loss"] for r in records if r["event"] == "iteration"]
    assert losses[-1] < losses[0] - 1.0  # it learns this text, and not another
    assert "tokens.weight" in torch.load(final)


def test_a_fresh_run_does_not_mix_with_old_checkpoints(nursery: Nursery, tmp_path: Path) -> None:
    old = tmp_path / "lazy" / "old"
    old.mkdir(parents=True)
    done = start(nursery, "lazy", tmp_path, "log").wait(DEADLINE_S)
    assert done.returncode != 0
    assert "--resume" in done.stderr
