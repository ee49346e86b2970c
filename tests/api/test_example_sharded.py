"""The example with --fsdp: killed and resumed, on as many ranks with the same bits, and on others."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nursery import Nursery, Ranks, sharding_nurseries
from support import wait_until
from test_example_ranks import (
    DEADLINE_S,
    SCRIPT,
    TINY,
    Record,
    assert_went_on,
    events,
    kill_once_saved,
    losses,
    run,
)

# On one rank and on two the same windows are in a batch.
SHARDED = {"torchrun": ["--fsdp", "--batch=4"], "alone": ["--fsdp", "--batch=8"]}
# Two ranks add up a gradient from two halves, so sums are rounded differently, and each step carries that on. A step moves a
# weight by up to 1e-3: one that is lost, or an average that is, shows.
CLOSE = {"rtol": 0.0, "atol": 5e-5}


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(2) as made:
        yield made


def start(nurseries: list[Nursery], where: Path, name: str, *more: str) -> Ranks:
    flags = [*TINY, f"--directory={where / 'saved'}", f"--events={where / name}", *SHARDED["torchrun"], *more]
    return Ranks(nurseries, SCRIPT, *flags)


def run_ranks(nurseries: list[Nursery], where: Path, name: str, *more: str) -> list[Record]:
    ended = start(nurseries, where, name, *more).wait(DEADLINE_S)
    assert [rank.returncode for rank in ended] == [0, 0], "".join(rank.stderr for rank in ended)
    return events(where / name)


def kill_ranks_once_saved(nurseries: list[Nursery], where: Path, saves: int, killed: tuple[int, ...]) -> list[Record]:
    """SIGKILL for these when so many saves are durable; what rank 0 had logged when all had ended."""
    ranks, log = start(nurseries, where, "killed"), where / "killed"
    try:
        wait_until(
            lambda: [e["event"] for e in events(log)].count("save") >= saves or ranks.any_has_ended(), DEADLINE_S, "progress"
        )
        for rank in killed:
            ranks.children[rank].signal(signal.SIGKILL)
    finally:
        ended = ranks.wait(DEADLINE_S)
    assert [ended[rank].returncode for rank in killed] == [-signal.SIGKILL] * len(killed), "it ended before it could be killed"
    assert all(rank.returncode != 0 for rank in ended)
    return events(log)


@pytest.fixture(scope="module")
def reference(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Uninterrupted, without a single save."""
    return run_ranks(nurseries, tmp_path_factory.mktemp("reference"), "log", "--engine=none")


@pytest.mark.parametrize("killed_ranks", [pytest.param((1,), marks=pytest.mark.slow), (0, 1)])
def test_ranks_are_killed_and_all_resume(
    killed_ranks: tuple[int, ...], nurseries: list[Nursery], reference: list[Record], tmp_path: Path
) -> None:
    killed = kill_ranks_once_saved(nurseries, tmp_path, 5, killed_ranks)
    resumed = run_ranks(nurseries, tmp_path, "resumed", "--resume")
    assert_went_on(reference, killed, resumed, saved=5)


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights at the end of an uninterrupted run of one process that shards nothing."""
    where = tmp_path_factory.mktemp("through")
    run("alone", where, "log", "--engine=none", "--batch=8", "--dropout=0", f"--final={where / 'final.pt'}")
    found: dict[str, torch.Tensor] = torch.load(where / "final.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("torchrun", "alone"), ("alone", "torchrun")])
def test_another_number_of_ranks_resumes(before: str, after: str, through: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Without dropout, for which each rank draws random numbers of its own."""
    last = 0 if before == "alone" else 1
    killed = kill_once_saved(before, tmp_path, 5, "--dropout=0", *SHARDED[before], ranks=(last,))
    final = tmp_path / "final.pt"
    resumed = run(after, tmp_path, "resumed", "--resume", "--dropout=0", f"--final={final}", *SHARDED[after])
    assert 5 <= resumed[0]["resumed_from"] <= len(losses(killed)) + 1
    found = torch.load(final)
    assert found.keys() == through.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, through[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_torch_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="it is not for --fsdp"):
        run("alone", tmp_path, "log", "--engine=torch", "--fsdp")
    assert not events(tmp_path / "log")
