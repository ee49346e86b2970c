"""LazyCheckpointIO under torchrun: DDP and sharded models that are killed and resumed, and what is left on disk then."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import PYTHONPATH, TESTS
from support import DEADLINE_S, options, wait_until

pytest.importorskip("lightning", reason="lightning is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from lightning_models import trainer

from ckpt.integrations.lightning import LazyCheckpointIO

SCRIPT = TESTS / "dist" / "lightning_training.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
STEPS = 12


def start(ranks: int, where: Path, *more: str) -> subprocess.Popen[str]:
    first = TORCHRUN if ranks == 2 else [sys.executable]
    return subprocess.Popen(
        [*first, str(SCRIPT), f"--directory={where}", f"--events={where}", f"--steps={STEPS}", *more],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
        start_new_session=True,
    )


def events(where: Path, name: str, rank: int, kind: str) -> list[dict[str, Any]]:
    log = where / f"{name}.{rank}"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["event"] == kind]


def digests(ranks: int, where: Path, name: str) -> list[str]:
    """Of each rank's state at the end of a run."""
    ends = [events(where, name, rank, "end")[0] for rank in range(ranks)]
    assert all(end["step"] == STEPS for end in ends)
    assert all(copied < 100_000 for end in ends for copied in end["copied"]), "weights or moments were copied in a save"
    return [end["digest"] for end in ends]


def run_and_kill(ranks: int, where: Path, after: int, *more: str) -> list[str]:
    """Trains to the end, and once more, to be killed when so many steps have begun; the digests of the first."""
    launcher = start(ranks, where, *more)
    try:
        wait_until(
            lambda: len(events(where, "killed", 0, "step")) >= after or launcher.poll() is not None,
            timeout_s=2 * DEADLINE_S,
            what="progress",
        )
    finally:
        for rank in range(ranks):
            for started in events(where, "killed", rank, "start"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(started["pid"], signal.SIGKILL)
        if not events(where, "killed", 0, "start"):
            os.killpg(launcher.pid, signal.SIGKILL)
        _, text = launcher.communicate(timeout=DEADLINE_S)
    assert events(where, "killed", 0, "step") and not events(where, "killed", 0, "end"), text[-4000:]
    return digests(ranks, where, "whole")


def resume(ranks: int, where: Path, *more: str) -> list[str]:
    launcher = start(ranks, where, "--resume", *more)
    _, text = launcher.communicate(timeout=2 * DEADLINE_S)
    assert launcher.returncode == 0, text[-4000:]
    return digests(ranks, where, "resumed")


@pytest.mark.parametrize(
    ("ranks", "more"),
    [pytest.param(1, (), marks=pytest.mark.slow), (2, ()), pytest.param(2, ("--sharded",), marks=pytest.mark.slow)],
    ids=["one rank", "DDP", "sharded"],
)
def test_killed_and_resumed_ends_in_the_same_state(ranks: int, more: tuple[str, ...], tmp_path: Path) -> None:
    whole = run_and_kill(ranks, tmp_path, 6, *more)
    assert_good(tmp_path / "saved")
    resumed = resume(ranks, tmp_path, *more)
    first = events(tmp_path, "resumed", 0, "step")[0]["step"]
    assert 3 <= first <= 6, "it began from the start"
    assert resumed == whole
    assert_good(tmp_path / "saved")
    assert [path for path in (tmp_path / "saved").iterdir() if path.name.startswith(".tmp-")] == []


def assert_good(directory: Path) -> None:
    """What has a name is whole."""
    found = [path for path in directory.iterdir() if not path.name.startswith(".")]
    assert len(found) >= 2
    for path in found:
        rest = path / "meta.pt" if path.is_dir() else path
        assert torch.load(rest, weights_only=False)["global_step"] > 0
        if path.is_dir():
            assert (path / ".metadata").exists() and (path / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--sharded",)], ids=["DDP", "sharded"])
@pytest.mark.parametrize("stock_first", [True, False], ids=["from stock", "to stock"])
def test_two_ranks_resume_from_what_the_other_has_saved(stock_first: bool, more: tuple[str, ...], tmp_path: Path) -> None:
    whole = run_and_kill(2, tmp_path, 6, *more, *(["--stock"] if stock_first else []))
    assert resume(2, tmp_path, *more, *([] if stock_first else ["--stock"])) == whole


@pytest.mark.parametrize("with_plugin", [True, False])
def test_lightning_itself_refuses_fsdp_without_a_gpu(with_plugin: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strategy `fsdp` requires a GPU accelerator"):
        trainer(tmp_path, LazyCheckpointIO(options()) if with_plugin else None, strategy="fsdp")


def test_all_ranks_learn_what_rank_0_knows_of_its_saves(tmp_path: Path) -> None:
    """Where its save is late they wait for it; where it has failed all of them raise, and none reads what is older."""
    launcher = subprocess.Popen(
        [*TORCHRUN, str(TESTS / "dist" / "lightning_agreement.py"), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
        start_new_session=True,
    )
    try:
        _, text = launcher.communicate(timeout=DEADLINE_S)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGTERM)  # torchrun ends its ranks
            launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 0, text[-4000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen.{rank}").read_text())
        assert (seen["loads"], seen["reads"]) == (2, 3)
        assert (seen["refused end"], seen["refused step"]) == ("", 2)
        for kind in ("ddp", "sharded"):
            assert seen[f"{kind} load"] == "CheckpointError"
            assert seen[f"{kind} end"] in ("StorageError", "CheckpointError")
            assert seen[f"{kind} too many"] == "FailedSavesError"
