"""What is read for torch.distributed.checkpoint, and fails: torch's reader asks a second time before it tells."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as stock
from support import options

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
