"""Checkpoints of before, kept as files in tests/kept: they load as on the day they were written, and a job goes on with them.

They were written by lazyckpt 0.1 as of November 2026, with torch 2.13: steps of one rank and of two, a bundle, a single file
whose tensor left lazily, and a bundle whose process was killed between its manifest and the names of its files. What they
must hold is computed here. A format that changes gets files of its own beside them.
"""

from __future__ import annotations

import concurrent.futures
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from places import TESTS
from support import DEADLINE_S, assert_same, options
from test_ranks_apart import Threaded, Wire

import ckpt

KEPT = TESTS / "kept"
SHARED = 7  # stands for a rank in what both ranks of two have saved together


def numbers(count: int, first: float = 0.0) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)


def state(step: int, rank: int = 0) -> dict[str, Any]:
    base = numbers(300, 1000.0 * step + 100_000.0 * rank)
    weight = base.reshape(20, 15)
    model = {"weight": weight, "column": weight[:, 3], "half": base[:64].to(torch.bfloat16)}
    moments = {"step": torch.tensor(float(step)), "exp_avg": base * 2}
    return {
        "model": model | {"mask": base > base.mean(), "empty": torch.zeros(0, 4)},
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 0.125, "params": [0]}]},
        "step": step,
        "name": f"rank {rank} at {step}",
        "sizes": (1, 2.5, None, True, b"bytes"),
    }


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy, since a job that goes on changes its directory."""
    return Path(shutil.copytree(KEPT, tmp_path / "kept"))


def test_steps_of_one_rank(kept: Path) -> None:
    with ckpt.Checkpointer(kept / "one", keep=2, options=options()) as checkpointer:
        assert checkpointer.steps() == [3, 4]
        found = checkpointer.restore()
        assert found is not None and found.step == 4
        assert_same(state(4), found.state)
        assert_same(state(3), ckpt.load(kept / "one" / "step-000000000003" / "state.pt"))
        checkpointer.save(5, state(5)).result(DEADLINE_S)
        assert checkpointer.steps() == [4, 5]


def test_steps_of_two_ranks(kept: Path) -> None:
    wire = Wire()
    ranks = [
        ckpt.Checkpointer(kept / "ranks", keep=2, coordinator=Threaded(wire, rank), options=options()) for rank in range(2)
    ]

    def restore(rank: int) -> None:
        found = ranks[rank].restore()
        assert found is not None and found.step == 4
        assert_same(state(4, rank), found.state)
        assert_same({"shared": state(4, SHARED)}, found.replicated)
        ranks[rank].save(5, state(5, rank), replicated={"shared": state(5, SHARED)}).result(DEADLINE_S)
        ranks[rank].close()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(restore, range(2)))
    assert sorted(path.name for path in (kept / "ranks").glob("step-*")) == ["step-000000000004", "step-000000000005"]


@pytest.mark.parametrize("written", ["bundle", "crash"])
def test_a_bundle(written: str, kept: Path) -> None:
    with ckpt.BundleCheckpointer(options=options()) as bundles:
        assert bundles.find(kept / written) == "tag"
        for rank in range(2):
            assert_same(state(4, rank), ckpt.load(kept / written / "tag" / f"part-{rank}.pt"))
        bundle = bundles.begin(kept / written, "tag")
        bundle.save(state(5), kept / written / "tag" / "part-0.pt")
        bundle.commit().result(DEADLINE_S)
        assert bundles.find(kept / written) == "tag"
        assert_same(state(5), torch.load(kept / written / "tag" / "part-0.pt"))


@pytest.mark.parametrize("load", [ckpt.load, torch.load], ids=["ckpt", "torch"])
def test_a_single_file(load: Any) -> None:
    found = load(KEPT / "file.pt")
    assert_same({"whole": torch.nn.Parameter(numbers(6000)), "small": numbers(3)}, found)


def test_they_are_all_looked_at() -> None:
    assert sorted(path.name for path in KEPT.iterdir()) == ["bundle", "crash", "file.pt", "one", "ranks"]
    assert torch.load(KEPT / "crash" / "tag" / "part-0.pt")["step"] == 3, "the crash has left the file of before in place"
