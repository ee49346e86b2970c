"""The example with --fsdp: killed and resumed, on as many ranks with the same bits, and on others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_example_ranks import Record, assert_went_on, events, kill_once_saved, losses, run

# On one rank and on two the same windows are in a batch.
SHARDED = {"torchrun": ["--fsdp", "--batch=4"], "alone": ["--fsdp", "--batch=8"]}
# Two ranks add up a gradient from two halves, so sums are rounded differently, and each step carries that on. A step moves a
# weight by up to 1e-3: one that is lost, or an average that is, shows.
CLOSE = {"rtol": 0.0, "atol": 5e-5}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Uninterrupted, without a single save."""
    return run("torchrun", tmp_path_factory.mktemp("reference"), "log", "--engine=none", *SHARDED["torchrun"])


@pytest.mark.parametrize("killed_ranks", [pytest.param((1,), marks=pytest.mark.slow), (0, 1)])
def test_ranks_are_killed_and_all_resume(killed_ranks: tuple[int, ...], reference: list[Record], tmp_path: Path) -> None:
    killed = kill_once_saved("torchrun", tmp_path, 5, *SHARDED["torchrun"], ranks=killed_ranks)
    resumed = run("torchrun", tmp_path, "resumed", "--resume", *SHARDED["torchrun"])
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
