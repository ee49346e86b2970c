"""`ckpt doctor`: what it finds is so, and nothing is left behind."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Shell

from ckpt.torch_private import TESTED
from ckpt.upkeep import machine


def findings(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {each["what"]: each for each in document["findings"]}


def test_a_directory_is_tried_out(shell: Shell, tmp_path: Path) -> None:
    found = findings(shell.json("doctor", tmp_path, "--size", "1MiB"))
    assert found["torch"]["found"] == torch.__version__ and found["locks"]["verdict"] == "good"
    assert {"file system", "space", "rename and fsync", "direct I/O", "write rate"} <= found.keys()
    assert list(tmp_path.iterdir()) == []
    assert shell("doctor").code == 0 and "locks" not in shell("doctor").out


def test_what_is_bad_is_told_with_a_remedy(shell: Shell, tmp_path: Path, native: Any, monkeypatch: Any) -> None:
    native.set_fault("rename", error=errno.EROFS)
    found = findings(shell.json("doctor", tmp_path, "--size", "4KiB", code=1))
    assert found["rename and fsync"]["verdict"] == "bad" and found["rename and fsync"]["remedy"]
    native.clear_faults()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine, "_version", lambda package: "2.5.1" if package == "torch" else None)
    said = shell("doctor")
    assert said.code == 1 and "install 2.6 or newer" in said.out and "install it for object stores" in said.out


def test_what_was_tested_and_what_the_file_system_wants(shell: Shell, tmp_path: Path, monkeypatch: Any) -> None:
    oldest, newest = (".".join(map(str, each)) for each in (machine._OLDEST_TORCH, machine._NEWEST_TORCH))
    assert f"{oldest} to {newest}" == TESTED
    found = findings(shell.json("doctor", tmp_path, "--size", "1MiB"))
    assert re.fullmatch(r"no|yes, in multiples of \d+ bytes", found["direct I/O"]["found"])
    monkeypatch.setattr(machine, "_version", lambda package: "99.0.1" if package == "torch" else None)
    newer = findings(shell.json("doctor"))["torch"]
    assert newer["verdict"] == "note" and newer["found"] == "99.0.1" and f"up to {newest}" in newer["remedy"]
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "enabled")
    huge = findings(shell.json("doctor"))["huge pages"]
    assert huge["verdict"] == "note" and huge["found"] == "transparent: never" and "madvise" in huge["remedy"]


def test_the_rate_stands_beside_that_of_fio(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def measured(directory: Path, size: int, threads: int, piece: int, *, direct: bool) -> float | None:
        return rates.pop() if rates else None

    monkeypatch.setattr(machine, "measure_with_fio", measured)
    found = findings(shell.json("doctor", tmp_path, "--size", "1MiB"))["write rate"]
    assert "install fio" in found["remedy"] and "4 threads, 1 MiB" in found["found"]
    rates[:] = [1e18, 1.0]
    assert findings(shell.json("doctor", tmp_path, "--size", "1MiB"))["write rate"]["verdict"] == "good"
    found = findings(shell.json("doctor", tmp_path, "--size", "1MiB"))["write rate"]
    assert found["verdict"] == "note" and "; fio 1000000000000 MB/s" in found["found"] and found["remedy"]


def test_wrong_usage(shell: Shell, tmp_path: Path) -> None:
    assert shell("doctor", tmp_path / "missing").code == 3
    assert shell("doctor", tmp_path, "--size", "much").code == 2
