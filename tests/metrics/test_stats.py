"""What a save has cost, in words and as durations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckpt
from ckpt import SaveStats
from ckpt.metrics import figures

MIB = 1 << 20
GOOD = SaveStats(
    save_s=0.003, fence_s=0.001, bytes_total=100 * MIB, bytes_from_tensors=100 * MIB, direct_io=True,
    started_at=10.0, captured_at=10.1, flushed_at=10.4, durable_at=10.5,
)  # fmt: skip


def with_(**changes: object) -> SaveStats:
    return SaveStats(**{**vars(GOOD), **changes})  # type: ignore[arg-type]


def test_durations_count_from_the_call() -> None:
    assert (GOOD.blocked_s, GOOD.captured_s) == (pytest.approx(0.004), pytest.approx(0.1))
    assert (GOOD.flushed_s, GOOD.durable_s) == (pytest.approx(0.4), pytest.approx(0.5))
    assert SaveStats().durable_s is None and with_(durable_at=None).flushed_s == pytest.approx(0.4)


def test_one_line_for_people() -> None:
    assert str(GOOD) == (
        "100 MiB durable after 500 ms (0.21 GB/s); training was held for 4 ms (3 ms in save(), 1 ms at fences)"
    )
    assert repr(GOOD).startswith("SaveStats(save_s=0.003, witness_s=0.0, fence_s=0.001,")
    assert str(with_(durable_at=None)).startswith("100 MiB flushed after 400 ms, not durable; training")
    assert str(with_(durable_at=None, flushed_at=None)).startswith("100 MiB captured after 100 ms, not durable")
    assert str(SaveStats()) == "0 B not captured; training was held for 0 ms"


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"arena_wait_s": 0.002, "arena_bytes": 512 * MIB}, "hint: 2 ms of that for room in the arena of 512 MiB: raise"),
        ({"bytes_copied_at_fence": 40 * MIB}, "hint: 40 MiB were copied at a fence"),
        ({"direct_io": False}, "hint: through the page cache"),
        ({"device_mode": "ordered", "device_mode_reason": "two saves so far"}, "mode 'ordered', not lazily: two saves so far"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_hint_when_something_is_amiss(changes: dict[str, object], hint: str) -> None:
    assert hint in str(with_(**changes)) and str(with_(**changes)).count("hint") == 1 and "\n" not in str(with_(**changes))


def test_little_of_it_is_nothing_amiss() -> None:
    assert "hint" not in str(with_(arena_wait_s=0.0001, bytes_copied_at_fence=MIB, device_mode="lazy"))


def test_figures_of_a_real_save(tmp_path: Path) -> None:
    pending = ckpt.save({"weight": torch.zeros(100_000)}, tmp_path / "x.pt")
    pending.result(60)
    stats, found = pending.stats, figures(pending.stats)
    assert found["checkpoint/bytes"] == stats.bytes_total == (tmp_path / "x.pt").stat().st_size
    assert found["checkpoint/blocked_s"] == stats.save_s + stats.fence_s and found["checkpoint/durable_s"] == stats.durable_s
    assert stats.durable_s is not None and found["checkpoint/gb_per_s"] == stats.bytes_total / stats.durable_s / 1e9
    assert 0 < (stats.captured_s or 0) <= (stats.written_s or 0) <= (stats.flushed_s or 0) <= stats.durable_s
    assert stats.named_s is None, "it has its name when it is published"
