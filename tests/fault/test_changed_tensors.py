"""A tensor is changed before its bytes were captured, and it comes out early or late: such a save never succeeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options, wait_until

import ckpt
from ckpt.errors import CaptureError

pytestmark = pytest.mark.usefixtures("native")


def save_and_change(native: Any, path: Path, **changes: Any) -> ckpt.PendingSave:
    """The write begins behind the change."""
    native.set_fault("pwritev", path.name, delay_s=60)
    weights = torch.ones(1 << 16)
    pending = ckpt.save({"weights": weights}, path, lazy=True, options=options(**changes))
    weights.add_(1)
    native.clear_faults("pwritev")
    return pending


def assert_failed(pending: ckpt.PendingSave, directory: Path, remaining: set[str]) -> None:
    error = pending.exception(30)
    assert isinstance(error, CaptureError), f"the save of changed tensors ended with {error!r}"
    assert "weights" in str(error) and "fence" in str(error)
    wait_until(lambda: {path.name for path in directory.iterdir()} == remaining, 5, "the removal of the unfinished file")


@pytest.mark.parametrize("verify", [False, True])
def test_noticed_while_writing(verify: bool, tmp_path: Path, native: Any) -> None:
    for _ in range(5):
        assert_failed(save_and_change(native, tmp_path / "a.pt", verify_capture=verify), tmp_path, set())
        native.clear_faults()


@pytest.mark.parametrize("call", ["ftruncate", "fdatasync"])
@pytest.mark.parametrize("verify", [False, True])
def test_noticed_while_finishing(verify: bool, call: str, tmp_path: Path, native: Any) -> None:
    native.set_fault(call, delay_s=0.3)
    assert_failed(save_and_change(native, tmp_path / "a.pt", verify_capture=verify), tmp_path, set())


@pytest.mark.parametrize("verify", [False, True])
def test_noticed_after_all_is_written(verify: bool, tmp_path: Path, native: Any) -> None:
    """The finisher is held up by the save before, and looks at this one only when it is on disk."""
    native.set_fault("rename", "first.pt", delay_s=0.6)
    first = ckpt.save({"n": 1}, tmp_path / "first.pt", options=options(verify_capture=verify))
    second = save_and_change(native, tmp_path / "second.pt", verify_capture=verify)
    assert_failed(second, tmp_path, {"first.pt"})
    assert ckpt.load(first.result(30)) == {"n": 1}


def test_the_file_before_it_stays(tmp_path: Path, native: Any) -> None:
    ckpt.save({"weights": torch.zeros(9)}, tmp_path / "a.pt", options=options()).result(30)
    native.set_fault("rename", "first.pt", delay_s=0.6)
    ckpt.save({"n": 1}, tmp_path / "first.pt", options=options())
    assert_failed(save_and_change(native, tmp_path / "a.pt"), tmp_path, {"a.pt", "first.pt"})
    assert_same({"weights": torch.zeros(9)}, ckpt.load(tmp_path / "a.pt"))


def test_steps_go_on_after_it(tmp_path: Path, native: Any) -> None:
    weights = torch.ones(1 << 16)
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, {"weights": weights}).result(30)
        native.set_fault("pwritev", "000000000002", delay_s=60)
        native.set_fault("fdatasync", "000000000002", delay_s=0.1)
        pending = checkpointer.save(2, {"weights": weights}, lazy=True)
        weights.add_(1)
        native.clear_faults("pwritev")
        assert isinstance(pending.exception(30), CaptureError)
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        assert_same({"weights": torch.ones(1 << 16)}, found.state)
        checkpointer.save(3, {"weights": weights}).result(30)
        assert checkpointer.steps() == [1, 3]
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
            "step-000000000001",
            "step-000000000003",
        ]
