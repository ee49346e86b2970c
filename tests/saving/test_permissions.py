"""A file that is replaced keeps its permissions, as torch.save keeps them; a new one gets what the umask gives."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults, options, wait_until
from test_ranks_apart import PATIENT

import ckpt

STATE = {"weights": torch.arange(50_000)}
NEWER = {"weights": torch.arange(50_000) + 1}
SMALL = options()
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o444, 0o666])
def test_the_mode_of_a_file_that_is_replaced(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    ckpt.save(STATE, path, options=SMALL).result(DEADLINE_S)
    assert mode_of(path) == 0o644
    path.chmod(mode)
    ckpt.save(NEWER, path, options=SMALL).result(DEADLINE_S)
    assert mode_of(path) == mode
    assert_same(NEWER, torch.load(path))


def test_the_temporary_file_is_not_readable_by_more(tmp_path: Path, native: Any) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    path.chmod(0o600)
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    pending = ckpt.save(NEWER, path, options=SMALL)
    wait_until(lambda: bool(list(tmp_path.glob(".tmp-*"))))
    assert [mode_of(found) for found in tmp_path.glob(".tmp-*")] == [0o600]
    clear_faults()
    pending.result(DEADLINE_S)


@as_root
def test_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    path.chmod(0o640)
    os.chown(path, 1234, 2345)
    ckpt.save(NEWER, path, options=SMALL).result(DEADLINE_S)
    found = path.stat()
    assert (found.st_uid, found.st_gid, mode_of(path)) == (1234, 2345, 0o640)
    assert_same(NEWER, torch.load(path))


@as_root
@pytest.mark.parametrize("call", ["fchown", "fchmod"])
def test_what_is_not_permitted_costs_no_save(call: str, tmp_path: Path, native: Any) -> None:
    """A group that is not kept gets no more than all others."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    path.chmod(0o660)
    os.chown(path, 1234, 2345)
    native.set_fault(call, error=errno.EPERM)
    ckpt.save(NEWER, path, options=SMALL).result(DEADLINE_S)
    assert_same(NEWER, torch.load(path))
    assert mode_of(path) & 0o077 in ((0,) if call == "fchown" else (0o040, 0o060, 0))


def test_a_step_that_is_saved_again(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=SMALL) as checkpointer:
        checkpointer.save(1, STATE).result(DEADLINE_S)
        file = next((tmp_path / "step-000000000001").glob("state*.pt"))
        assert mode_of(file) == 0o644
        file.chmod(0o660)
        for _ in range(2):
            checkpointer.save(1, NEWER).result(DEADLINE_S)
            files = list((tmp_path / "step-000000000001").glob("state*.pt"))
            assert [mode_of(each) for each in files] == [0o660]
        checkpointer.save(2, NEWER).result(DEADLINE_S)
        assert mode_of(tmp_path / "step-000000000002" / "state.pt") == 0o644


def test_a_bundle_that_is_saved_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "model.pt"
    with closing(ckpt.BundleCheckpointer(options=options(**PATIENT), coordinator="local")) as saver:
        for value, mode in ((STATE, 0o644), (NEWER, 0o660), (STATE, 0o660)):
            bundle = saver.begin(tmp_path, "a")
            bundle.save(value, path)
            bundle.commit().result(DEADLINE_S)
            assert mode_of(path) == mode
            assert_same(value, torch.load(path))
            path.chmod(0o660)


def test_an_access_list(tmp_path: Path) -> None:
    """Its mask stands where the bits of the group are: without the list they would be the group's."""
    name, nobody = "system.posix_acl_access", 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, 6, 1234), (4, 0, nobody), (0x10, 6, nobody), (0x20, 0, nobody)]
    wanted = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    try:
        os.setxattr(path, name, wanted)
    except OSError as error:
        pytest.skip(f"no access lists on this file system: {error}")
    ckpt.save(NEWER, path, options=SMALL).result(DEADLINE_S)
    assert os.getxattr(path, name) == wanted
    assert mode_of(path) == 0o660
    assert_same(NEWER, torch.load(path))
