"""The benchmark of an object store with tiny sizes: its lines. No speed is judged."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from bench.measure.report import Report
from bench.measure.sampling import Settings
from bench.object_store import workload

CASES = [
    f"{what}{end}" for what in ("upload", "restore") for end in (", ours", ", obstore alone", ": rate / that of obstore alone")
]


def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the server that starts in a moment."""
    for package in ("ministack", "obstore"):
        pytest.importorskip(package, reason=f"the benchmark of object stores needs the package {package}")
    monkeypatch.setattr(workload, "weed", lambda: None)
    monkeypatch.setattr(workload, "interleave", functools.partial(workload.interleave, warmup=0))
    report = Report({"command": ""}, 0.001)
    workload.measure_object(Settings(tmp_path, 0.001, 1, rest_s=0.0), report)
    assert [line["case"] for line in report.lines] == CASES
    assert all(line["value"] > 0 and line["detail"]["server"] == "ministack" for line in report.lines)
    assert [line["bar"] for line in report.lines if line["bar"]] == [">= 0.8"] and report.lines[2]["passed"] is None
    assert [*tmp_path.iterdir()] == []
