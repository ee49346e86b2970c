"""Saves to one directory: which of them who comes next waits for."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import CheckpointError
from ckpt.integrations.dcp import in_flight


def waits(path: Path, by_torch: bool) -> bool:
    try:
        in_flight.await_earlier(path, by_torch, 0.0)
    except CheckpointError as error:
        assert "has not ended within" in str(error)
        return True
    return False


@pytest.mark.parametrize("ends_first", [0, 1])
def test_torch_waits_for_all(ends_first: int, tmp_path: Path) -> None:
    """Also for the older one, when the newer has ended."""
    futures: list[Future[Any]] = [Future(), Future()]
    for future in futures:
        in_flight.note(tmp_path, False, future)
    assert waits(tmp_path, True) and not waits(tmp_path, False)
    futures[ends_first].set_result(None)
    assert waits(tmp_path, True)
    futures[1 - ends_first].set_exception(OSError())
    assert not waits(tmp_path, True)


def test_ours_waits_for_torch_alone(tmp_path: Path) -> None:
    of_torch: Future[Any] = Future()
    in_flight.note(tmp_path / "a" / "..", True, of_torch)
    in_flight.note(tmp_path, False, Future())
    assert waits(tmp_path, False)
    of_torch.set_result(None)
    assert not waits(tmp_path, False) and not waits(tmp_path / "other", True)
