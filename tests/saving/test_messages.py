"""What is said when something is wrong: once, with the place, the cause, and what to do."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, options

import ckpt
from ckpt.commit.replica_check import first_difference
from ckpt.integrations.torch import CheckpointCallback

pytestmark = pytest.mark.usefixtures("native")


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_file_where_a_directory_should_be_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    with pytest.raises(ckpt.StorageError, match=r"afile' is a regular file, not a directory; choose another path$") as caught:
        ckpt.Checkpointer(tmp_path / "afile", options=options())
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_failed_save_is_named_once(native: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    native.set_fault("pwritev", delay_s=0.2)
    tensor = torch.ones(500_000)
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        pending = checkpointer.save(1, {"x": tensor}, lazy=True)
        tensor.add_(1)
        ckpt.fence()
        error = pending.exception(DEADLINE_S)
        assert isinstance(error, ckpt.CaptureError)
        (said,) = errors_in(caplog)
        assert said.count("the save ") == 1 and said.count(str(tmp_path)) == 1, said
        checkpointer.save(2, {"x": 1}).result(DEADLINE_S)


def test_at_the_end_one_error_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What close() would raise is the cause of what is on its way."""

    def train(checkpointer: ckpt.Checkpointer) -> None:
        for step in range(2, 9):
            checkpointer.save(step, {"x": 1}).exception(DEADLINE_S)

    with pytest.raises(ckpt.FailedSavesError) as caught, ckpt.Checkpointer(tmp_path / "run", options=options()) as checkpointer:
        checkpointer.save(1, {"x": 1}).result(DEADLINE_S)
        shutil.rmtree(tmp_path / "run")
        train(checkpointer)
    assert len(errors_in(caplog)) == 3 and all("was removed" in text for text in errors_in(caplog)), "of each save, no more"
    assert caught.value.__cause__ is not None and caught.value.__cause__.__context__ is None
    caplog.clear()
    with pytest.raises(KeyError), ckpt.Checkpointer(tmp_path / "other", options=options()) as checkpointer:
        checkpointer.save(1, {"x": 1}).result(DEADLINE_S)
        shutil.rmtree(tmp_path / "other")
        checkpointer.save(2, {"x": 1}).exception(DEADLINE_S)
        raise KeyError("another one")
    assert "closing the Checkpointer of" in errors_in(caplog)[-1] and "was removed" in errors_in(caplog)[-1]


def test_a_target_for_the_other_state_of_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with CheckpointCallback(tmp_path, model=model, options=options()) as callback:
        callback.step(1)
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        with pytest.raises(ckpt.MismatchError, match=r"model is missing.*replicated state, too, which replicated_into= takes"):
            checkpointer.restore(into={"model": model})
        with pytest.raises(ckpt.MismatchError, match=r"rng is missing.*a state of rank 0 for itself, too, which into= takes"):
            checkpointer.restore(replicated_into={"rng": 1})
        assert checkpointer.restore(replicated_into={"model": model}) is not None


def test_the_step_of_an_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    path = ckpt.save({"optimizer": optimizer.state_dict()}, tmp_path / "x.pt", options=options()).result(DEADLINE_S)
    for step in (5, torch.zeros(1)):
        target = copy.deepcopy(optimizer.state_dict())
        target["state"][0]["step"] = step
        with pytest.raises(ckpt.MismatchError, match=r"optimizer\.state\.0\.step .*give the optimizer itself, not its state"):
            ckpt.load_into(path, {"optimizer": target})
        fresh = torch.optim.AdamW(model.parameters())
        ckpt.load_into(path, {"optimizer": fresh})
        assert fresh.state_dict()["state"][0]["step"] == 1


def test_plain_values_come_back(tmp_path: Path) -> None:
    path = ckpt.save({"epoch": 3, "done": [1, 2], "w": torch.ones(2)}, tmp_path / "x.pt", options=options()).result(DEADLINE_S)
    target = {"epoch": 0, "done": [0, 0], "w": torch.zeros(2)}
    ckpt.load_into(path, target)
    assert (target["epoch"], target["done"]) == (3, [1, 2])


class DeviceMesh:
    """As torch's, it is pickled with the number of the rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank


def test_what_each_rank_has_of_its_own_is_named() -> None:
    ours, theirs = (pickle.dumps({"model": {"w": [DeviceMesh(rank)]}}, 2) for rank in (0, 1))
    found = first_difference(ours, theirs, 0, 1)
    assert "holds a DeviceMesh, in 'model/w/0'" in found and "give what is sharded as sharded=" in found
