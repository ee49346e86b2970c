"""Bundles that hold what other sessions save, and bundles that make room for others."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, clear_faults, options

import ckpt
from ckpt.dcp import DcpCheckpointer
from ckpt.errors import CheckpointError, CorruptError


@pytest.fixture
def saver(native: Any) -> Iterator[ckpt.BundleCheckpointer]:
    made = ckpt.BundleCheckpointer(options=options(), coordinator="local")
    yield made
    clear_faults()
    with contextlib.suppress(CheckpointError):  # tests have looked at it
        made.close()


@pytest.fixture
def sharded() -> Iterator[DcpCheckpointer]:
    made = DcpCheckpointer(options=options(), alone=True)
    yield made
    with contextlib.suppress(CheckpointError):
        made.close()


def save(saver: ckpt.BundleCheckpointer, root: Path, name: str, sharded: DcpCheckpointer | None = None) -> ckpt.PendingSave:
    bundle = saver.begin(root, name, named_last=True, move_latest=False)
    bundle.save({"a": torch.ones(3)}, bundle.directory / "a.pt")
    if sharded is not None:
        bundle.follow(sharded.save(bundle.directory / "shards", {"model": {"b": torch.ones(100_000)}}))
    return bundle.commit()


def test_a_bundle_has_its_name_behind_what_it_follows(
    saver: ckpt.BundleCheckpointer, sharded: DcpCheckpointer, native: Any, tmp_path: Path
) -> None:
    native.set_fault("fdatasync", "__0_0.distcp", delay_s=DEADLINE_S)
    looked = threading.Event()
    pending = save(saver, tmp_path, "state", sharded)
    saver.begin(tmp_path, "other", named_last=True, move_latest=False).commit()  # its publication comes after
    pending.add_captured_callback(lambda _: looked.set())
    assert looked.wait(DEADLINE_S) and not (tmp_path / "state").exists()
    clear_faults()
    assert pending.result(DEADLINE_S) == tmp_path / "state"
    found: dict[str, Any] = {"model": {"b": torch.zeros(100_000)}}
    torch.distributed.checkpoint.load(found, checkpoint_id=tmp_path / "state" / "shards")
    assert found["model"]["b"].sum() == 100_000


def test_a_bundle_fails_with_what_it_follows(
    saver: ckpt.BundleCheckpointer, sharded: DcpCheckpointer, native: Any, tmp_path: Path
) -> None:
    save(saver, tmp_path, "state", sharded).result(DEADLINE_S)
    before = sorted(path.name for path in (tmp_path / "state" / "shards").iterdir())
    native.set_fault("pwritev", "distcp", error=5)
    with pytest.raises(CheckpointError, match="__0_0"):
        save(saver, tmp_path, "state", sharded).result(DEADLINE_S)
    clear_faults()
    assert sorted(path.name for path in (tmp_path / "state" / "shards").iterdir()) == before
    assert not list(tmp_path.glob(".lazyckpt-*"))


def test_the_newest_stays(saver: ckpt.BundleCheckpointer, tmp_path: Path) -> None:
    for name in ("first", "second"):
        save(saver, tmp_path, name).result(DEADLINE_S)
    with pytest.raises(CheckpointError, match="newest"):
        saver.remove(tmp_path / "second")
    saver.remove(tmp_path / "first")
    saver.remove(tmp_path / "first")  # is gone
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["second"]


def test_what_was_saved_again_by_something_else_is_told(saver: ckpt.BundleCheckpointer, tmp_path: Path) -> None:
    save(saver, tmp_path, "state").result(DEADLINE_S)
    os.utime(tmp_path / "state" / "manifest.json", (1, 1))  # else both may be of one tick of the clock
    torch.save({"a": torch.zeros(3)}, tmp_path / "state" / "a.pt")
    with pytest.raises(CorruptError, match=r"if something else has saved the checkpoint again, remove the manifest\.json"):
        saver.find(tmp_path, "state")
    os.utime(tmp_path / "state" / "a.pt", (0, 0))  # as damage leaves it
    with pytest.raises(CorruptError, match=r"its manifest says [0-9]+$"):
        saver.find(tmp_path, "state")
