"""The benchmark of saves that write only what has changed, at a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
from mounting import MIB, mounted

from bench.measure.report import Report
from bench.measure.sampling import Settings
from bench.workloads import reuse
from ckpt.saving import frozen_file


def test_what_is_written_and_what_is_not(tmp_path: Path) -> None:
    with mounted("xfs", tmp_path / "disk", 320 * MIB) as place:
        report = Report({}, 0.016)
        reuse.measure_reuse(Settings(place / "files", 0.016, rounds=2, rest_s=0), report)
    written = {line["case"]: line["value"] for line in report.lines if line["quantity"] == "written_bytes"}
    for name in ("reuse", "frozen="):
        assert written[f"an adapter learns, {name}"] < written["an adapter learns, no reuse"] / 10
    for name in ("no reuse", "reuse"):
        assert written[f"all learns, {name}"] > 16 * MIB
    times = {line["case"] for line in report.lines if line["quantity"] == "durable_s"}
    assert times == written.keys() and {line["n"] for line in report.lines} == {2}


def test_where_nothing_can_be_shared_it_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "shares_blocks", lambda directory: False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="run as root"):
        reuse.measure_reuse(Settings(tmp_path), Report({}, 1.0))


def test_what_is_linked_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_file, "LEAST_BYTES", MIB)
    report = Report({}, 0.016)
    reuse.measure_frozen_files(Settings(tmp_path / "files", 0.016, rounds=2, rest_s=0), report)
    written = {line["case"]: line["value"] for line in report.lines if line["quantity"] == "written_bytes"}
    case = "an adapter learns, hard links"
    assert written[f"{case}, separate"] < written[f"{case}, together"] / 10
