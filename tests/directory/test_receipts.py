"""Receipts of ranks on the disk of their node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt.directory.manifest import RANK, REPLICATED, FileEntry
from ckpt.directory.receipts import Receipt, read_receipts, write_receipt
from ckpt.errors import StorageError


def test_a_receipt_says_what_a_rank_has_written(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "step-000000000007"
    directory.mkdir(parents=True)
    mine = [FileEntry("rank-00003.pt", 10, 5, RANK, 3), FileEntry("replicated.pt", 4, 6, REPLICATED, 0)]
    write_receipt(directory, 3, mine, "token-1")
    write_receipt(directory, 12, mine[:1], "token-1")
    assert read_receipts(directory) == [Receipt(3, "token-1", tuple(mine)), Receipt(12, "token-1", tuple(mine[:1]))]
    assert (directory / "receipt-00003.json").exists()
    write_receipt(directory, 3, mine[:1], "token-2")
    assert read_receipts(directory)[0] == Receipt(3, "token-2", tuple(mine[:1]))
    text = (directory / "receipt-00012.json").read_text()
    (directory / "receipt-00012.json").write_text(text.replace("token-1", "token-2"))
    assert [receipt.rank for receipt in read_receipts(directory)] == [3], "its own CRC-32 tells"


def test_a_receipt_is_synced_with_the_names_of_the_files_and_of_the_step(tmp_path: Path, native: Any) -> None:
    directory = tmp_path / "run" / "step-000000000007"
    directory.mkdir(parents=True)
    for call, part in (("fsync", "receipt-00000"), ("fsync", directory.name), ("fsync", "run"), ("rename", "receipt-00000")):
        native.set_fault(call, part, error=5)
        with pytest.raises(StorageError):
            write_receipt(directory, 0, [], "token")
        native.clear_faults()
