"""What is read for torch.distributed.checkpoint, and fails: torch's reader asks a second time before it tells."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from support import DEADLINE_S, options

import ckpt
from ckpt.errors import NotACheckpointError
from ckpt.integrations import dcp

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

MANY_BYTES = 1 << 20


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def fail(file: int, buffers: list[memoryview], *more: int) -> int:
        if sum(map(len, buffers)) > MANY_BYTES:
            raise OSError(errno.EIO, "no more")
        return preadv(file, buffers, *more)

    dcp.configure(options())
    try:
        dcp.save({"tensor": torch.randn(MANY_BYTES)}, checkpoint_id=tmp_path)
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(stock.CheckpointException) as found:
            dcp.load({"tensor": torch.zeros(MANY_BYTES)}, checkpoint_id=tmp_path)
    finally:
        dcp.close()
    ((error, _),) = found.value.failures.values()
    assert isinstance(error, OSError) and error.errno == errno.EIO


def test_a_directory_that_is_no_checkpoint_says_what_it_is(tmp_path: Path, native: Any) -> None:
    """Most of all one whose save did not finish."""
    state, unfinished, empty = {"a": torch.ones(3)}, tmp_path / "unfinished", tmp_path / "empty"
    empty.mkdir()
    dcp.configure(options())
    try:
        dcp.save(state, checkpoint_id=unfinished)
        for name in ("manifest.json", ".metadata"):  # as they come behind the files
            (unfinished / name).unlink()
    finally:
        dcp.close()
    with ckpt.Checkpointer(tmp_path / "job", options=options()) as checkpointer:
        step = checkpointer.save(1, state).result(DEADLINE_S)
    for directory, text in (
        (unfinished, r"no \.metadata in it.*written last of all.*the save did not finish.*Load an older"),
        (empty, r"it is empty: the save did not finish"),
        (step, r"saved without sharded=: Checkpointer\(\.\.\.\)\.restore\(\)"),
        (step.parent, rf"steps of a Checkpointer: name one that was saved with sharded=, as '{step}'"),
    ):
        with pytest.raises(NotACheckpointError, match=text) as raised:
            dcp.load(state, checkpoint_id=directory)
        assert str(directory) in str(raised.value)
    with pytest.raises(stock.CheckpointException, match="No such file"):
        dcp.load(state, checkpoint_id=tmp_path / "nothing")


def test_what_each_rank_has_written_for_itself_is_left_to_torch(tmp_path: Path) -> None:
    (tmp_path / "__0.metadata").write_bytes(b"of torch")
    reader = dcp.VerifyingStorageReader(tmp_path)
    with pytest.raises(FileNotFoundError):
        reader.read_metadata()
    assert reader.damage is None
