"""Receipts of ranks on the disk of their node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt.directory.in_flight import FilesInFlight
from ckpt.directory.keeping import Keeping
from ckpt.directory.manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.directory.receipts import Receipt, names_of_receipts, place_in, read_receipts, write_receipt
from ckpt.directory.retention import Retention
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


def test_the_receipts_of_a_commit_stay_as_long_as_it_does(tmp_path: Path) -> None:
    """Another job saves the step again: until that is decided, the old one is delivered as it was made."""
    directory = tmp_path / "step-000000000007"
    directory.mkdir()
    old, new = FileEntry("rank-00000.pt", 3, 5, RANK, 0), FileEntry("rank-00000-4.pt", 3, 6, RANK, 0)
    place = NodePlace(1, 2, (0, 3))
    write_receipt(directory, 0, [old], "token-1", place)
    committed = Manifest(7, 1, 4, (old,))
    (directory / "manifest.json").write_bytes(committed.to_json())
    second = write_receipt(directory, 0, [new], "token-2", NodePlace(0, 1, (0,)))
    again = write_receipt(directory, 0, [new], "token-2", NodePlace(0, 1, (0,)))
    assert second == again and second.name == "receipt-00000-2.json"
    assert place_in(directory, committed) == place
    assert place_in(directory, Manifest(7, 2, 1, (new,))) == NodePlace(0, 1, (0,))
    Retention(tmp_path, FilesInFlight(), Keeping(), True, 1, lambda _: None, lambda *_: None).remove_leftovers()
    assert {path.name for path in directory.iterdir()} == {"manifest.json", "receipt-00000.json"}, "as at the next start"
    assert names_of_receipts(directory, committed) == {"receipt-00000.json"}


def test_a_receipt_is_synced_with_the_names_of_the_files_and_of_the_step(tmp_path: Path, native: Any) -> None:
    directory = tmp_path / "run" / "step-000000000007"
    directory.mkdir(parents=True)
    for call, part in (("fsync", "receipt-00000"), ("fsync", directory.name), ("fsync", "run"), ("rename", "receipt-00000")):
        native.set_fault(call, part, error=5)
        with pytest.raises(StorageError):
            write_receipt(directory, 0, [], "token")
        native.clear_faults()
