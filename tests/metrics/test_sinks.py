"""`metrics=`: each save that ends is told to those who asked for it, with its outcome and its cost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_records import Kept

import ckpt
from ckpt.integrations.torch import CheckpointCallback
from ckpt.metrics import SaveRecord

DEADLINE_S = 60.0


class Raising(Kept):
    def saved(self, record: SaveRecord) -> None:
        raise ZeroDivisionError("the network is gone")

    def close(self) -> None:
        raise ZeroDivisionError("again")


def job(directory: Path, *sinks: Any, **more: Any) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, coordinator="local", metrics=sinks, **more)


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1000, 100), float(step))}


def test_each_save_is_told_once_and_in_order(tmp_path: Path) -> None:
    kept = Kept()
    with job(tmp_path, kept) as checkpointer:
        for step in range(5):
            checkpointer.save(step, state(step))
        checkpointer.wait(DEADLINE_S)
        assert [(r.step, r.outcome, r.path.name) for r in kept.records] == [
            (step, "committed", f"step-{step:012d}") for step in range(5)
        ]
        for record in kept.records:
            stats = record.stats
            assert record.error is None and (record.rank, record.world_size) == (0, 1)
            assert stats.bytes_total > 400_000 and stats.save_s > 0
            assert None not in (stats.started_at, stats.captured_at, stats.flushed_at, stats.durable_at)
        assert kept.closed == 0
    assert kept.closed == 1


def test_it_is_told_before_the_result_is_there(tmp_path: Path) -> None:
    kept = Kept()
    with job(tmp_path, kept) as checkpointer:
        for step in range(20):
            checkpointer.save(step, state(step)).result(DEADLINE_S)
            assert len(kept.records) == step + 1


def test_a_save_that_fails(tmp_path: Path) -> None:
    kept = Kept()
    with pytest.raises(ckpt.CheckpointError), job(tmp_path, kept) as checkpointer:
        checkpointer.save(0, state(0)).result(DEADLINE_S)
        (tmp_path / "step-000000000001").write_text("in the way")
        failed = checkpointer.save(1, state(1)).exception(DEADLINE_S)
        assert failed is not None
    assert [(r.step, r.outcome) for r in kept.records] == [(0, "committed"), (1, "failed")]
    assert kept.records[1].error is failed and kept.records[1].stats.durable_at is None


def test_a_save_that_is_skipped(tmp_path: Path, native: Any) -> None:
    kept = Kept()
    with job(tmp_path, kept, options=ckpt.Options(when_busy="skip", max_in_flight=1)) as checkpointer:
        native.set_fault("pwritev", delay_s=DEADLINE_S)
        pending = [checkpointer.save(step, {"weight": torch.zeros(4_000_000)}) for step in range(30)]
        native.clear_faults()
        outcomes = [
            "skipped" if isinstance(each.exception(DEADLINE_S), ckpt.errors.SkippedError) else "committed" for each in pending
        ]
    assert sorted((r.step, r.outcome) for r in kept.records) == list(enumerate(outcomes))
    assert {"skipped", "committed"} == {*outcomes}


def test_one_that_raises_costs_nothing_but_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    with caplog.at_level(logging.ERROR, "ckpt"), job(tmp_path, Raising(), kept) as checkpointer:
        checkpointer.save(3, state(3)).result(DEADLINE_S)
    assert [r.step for r in kept.records] == [3] and kept.closed == 1
    assert [text.partition(" the save")[0] for text in caplog.messages] == ["Raising failed to note", "Raising failed to close"]
    assert torch.equal(ckpt.load(tmp_path / "step-000000000003" / "state.pt")["weight"], state(3)["weight"])


def test_what_is_no_sink(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"metrics= takes objects with saved\(\) and close\(\), and function has not both"):
        job(tmp_path, lambda record: None)


def test_bundles(tmp_path: Path) -> None:
    kept = Kept()
    with ckpt.BundleCheckpointer(coordinator="local", metrics=[kept]) as checkpointer:
        (tmp_path / "tag").mkdir()
        bundle = checkpointer.begin(tmp_path, "tag", step=7)
        bundle.save(state(7), tmp_path / "tag" / "state.pt")
        bundle.commit().result(DEADLINE_S)
    assert [(r.step, r.outcome, r.path) for r in kept.records] == [(7, "committed", tmp_path / "tag")] and kept.closed == 1


def test_the_callback(tmp_path: Path) -> None:
    kept, model = Kept(), torch.nn.Linear(3, 2)
    with CheckpointCallback(tmp_path, model=model, every=2, metrics=[kept], coordinator="local") as callback:
        for step in range(1, 5):
            callback.step(step)
    assert [(r.step, r.outcome) for r in kept.records] == [(2, "committed"), (4, "committed")] and kept.closed == 1
