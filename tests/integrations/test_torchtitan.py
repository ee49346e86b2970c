"""LazyCheckpointManager in place of torchtitan's CheckpointManager: what it saves, keeps, resumes and refuses."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from places import PYTHONPATH, TESTS
from support import DEADLINE_S, wait_until

pytest.importorskip("torchtitan", reason="torchtitan is not installed (pip install torchtitan==0.3.0 tyro)")
sys.path.append(str(TESTS / "dist"))

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan_training import Training

from ckpt.errors import CorruptError, FailedSavesError, StorageError, UnsupportedError
from ckpt.integrations.torchtitan import titan_private

SCRIPT = TESTS / "dist" / "torchtitan_training.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps_in(directory: Path) -> set[str]:
    return {path.name for path in (directory / "checkpoint").iterdir()}


@pytest.mark.parametrize("first", [pytest.param("stock", marks=pytest.mark.slow), "lazy"])
def test_either_resumes_from_what_the_other_has_saved(first: str, tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole")
    whole.train(5)
    kinds: dict[str, dict[str, Any]] = {"stock": {"kind": CheckpointManager}, "lazy": {}}
    Training(tmp_path / "run", **kinds[first]).train(3)
    second = Training(tmp_path / "run", **kinds["stock" if first == "lazy" else "lazy"])
    begun: list[int] = []
    second.train(5, begun.append)
    assert begun == [4, 5] and second.digest() == whole.digest()


@pytest.mark.parametrize(
    "mode", ["async", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("async_with_pinned_mem", "disabled"))]
)
def test_the_newest_are_kept_and_each_is_of_its_step(mode: str, tmp_path: Path, native: Any) -> None:
    """Bytes leave late: what is written without a fence would be found in them."""
    native.set_fault("pwritev", delay_s=0.02)
    training = Training(tmp_path, async_mode=mode, keep_latest_k=3)
    weights: dict[int, torch.Tensor] = {}
    training.train(6, lambda step: weights.__setitem__(step - 1, training.model[0].weight.detach().clone()))
    assert steps_in(tmp_path) >= {"step-4", "step-5", "step-6"} and not steps_in(tmp_path) & {"step-1", "step-2"}
    again = Training(tmp_path, kind=CheckpointManager)
    again.checkpointer.load(step=5)
    assert torch.equal(again.model[0].weight, weights[5]) and again.loader.taken == 5


def test_with_async_disabled_a_save_is_there_when_it_returns(tmp_path: Path) -> None:
    training = Training(tmp_path, async_mode="disabled")
    training.step = 1
    assert training.checkpointer.save(1) and (tmp_path / "checkpoint" / "step-1" / ".metadata").exists()
    training.checkpointer.close()


def test_while_the_newest_is_in_flight_older_ones_stay(tmp_path: Path, native: Any) -> None:
    training = Training(tmp_path, keep_latest_k=2)

    def seen(step: int) -> None:
        if step == 3:
            training.checkpointer.maybe_wait_for_saving()
            native.set_fault("fdatasync", delay_s=DEADLINE_S)
        elif step == 4:
            complete = {path.parent.name for path in tmp_path.glob("checkpoint/*/.metadata")}
            native.clear_faults()
            assert complete == {"step-1", "step-2"}

    training.train(5, seen)


def test_a_failed_save_is_no_checkpoint_and_too_many_end_the_training(tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", error=errno.EIO)
    training = Training(tmp_path, max_failed_saves=2)

    def seen(step: int) -> None:
        if step > 1:
            with pytest.raises(StorageError):
                training.checkpointer.maybe_wait_for_saving()

    with pytest.raises(FailedSavesError, match="the last 2 checkpoints"):
        training.train(9, seen)
    assert training.step == 3 and list(tmp_path.glob("checkpoint/*/.metadata")) == []
    native.clear_faults()
    with pytest.raises(StorageError):
        training.checkpointer.close()
    assert Training(tmp_path).checkpointer.load() is False


def test_a_save_that_cannot_even_be_begun_is_a_failed_one(tmp_path: Path, native: Any) -> None:
    native.set_fault("mkdir", path_part="step-2", error=errno.ENOSPC)
    Training(tmp_path).train(3)
    assert steps_in(tmp_path) == {"step-1", "step-3"}


def test_damage_is_found(tmp_path: Path) -> None:
    Training(tmp_path).train(1)
    (path,) = tmp_path.glob("checkpoint/step-1/*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError):
        Training(tmp_path).checkpointer.load()


def test_what_is_not_enabled_or_only_loads_saves_nothing(tmp_path: Path) -> None:
    for config in ({"enable": False}, {"load_only": True}):
        Training(tmp_path, **config).train(1)
    assert not (tmp_path / "checkpoint").exists()


def test_a_torchtitan_without_the_seams_is_refused() -> None:
    class Other(CheckpointManager):
        def _save(self) -> bool:  # type: ignore[override]
            return False

    with pytest.raises(UnsupportedError, match=rf"no _save\(self, curr_step, last_step\).*torchtitan {titan_private.TESTED}"):
        titan_private.check(Other)


def events(where: Path, name: str, rank: int, kind: str) -> list[dict[str, Any]]:
    log = where / f"{name}.{rank}"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [found for line in lines if line.endswith("\n") and (found := json.loads(line))["event"] == kind]


def start(where: Path, *more: str) -> subprocess.Popen[str]:
    site = str(Path(importlib.import_module("torchtitan").__path__[0]).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PYTHONPATH}:{site}"}
    command = [*TORCHRUN, str(SCRIPT), f"--directory={where}", "--steps=12", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_two_ranks_are_killed_and_resumed(tmp_path: Path) -> None:
    launcher = start(tmp_path)
    try:
        wait_until(lambda: len(events(tmp_path, "first", 0, "step")) >= 6 or launcher.poll() is not None, what="progress")
    finally:
        for rank in range(2):
            for begun in events(tmp_path, "first", rank, "step")[:1]:
                os.kill(begun["pid"], signal.SIGKILL)
        _, text = launcher.communicate(timeout=DEADLINE_S)
    whole = [events(tmp_path, "first", rank, "end") for rank in range(2)]
    assert all(whole) and not events(tmp_path, "first", 0, "end of saved"), text[-4000:]
    resumed = start(tmp_path, "--resume")
    _, text = resumed.communicate(timeout=2 * DEADLINE_S)
    assert resumed.returncode == 0 and "plans the save" not in text, text[-4000:]
    assert events(tmp_path, "resumed", 0, "step")[0]["step"] in range(4, 8)
    for rank in range(2):
        assert events(tmp_path, "resumed", rank, "end of saved")[0]["digest"] == whole[rank][0]["digest"]
