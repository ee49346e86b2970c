"""What fio is asked, and what becomes of its answer; fio itself need not be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt.storage.fio import FioError, measure_with_fio

PROGRAM = """#!/bin/sh
for word; do case $word in --filename=*) echo bytes > "${word#--filename=}";; esac; done
echo "$@" > "$(dirname "$0")/asked"
%s
"""


def fio(directory: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> Path:
    """The first on the path."""
    directory.mkdir()
    (directory / "fio").write_text(PROGRAM % answer)
    (directory / "fio").chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    return directory / "asked"


def test_the_same_is_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.dumps({"jobs": [{"error": 0, "write": {"bw_bytes": 123456}}]})
    asked = fio(tmp_path / "bin", monkeypatch, f"echo 'note: latency'; echo '{told}'")
    (tmp_path / "d").mkdir()
    assert measure_with_fio(tmp_path / "d", 64 << 20, 4, 4 << 20, direct=True) == 123456
    words = asked.read_text().split()
    assert {"--direct=1", "--numjobs=4", f"--bs={4 << 20}", f"--size={16 << 20}", "--end_fsync=1", "--rw=write"} <= {*words}
    assert [*(tmp_path / "d").iterdir()] == []


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("echo nonsense >&2; exit 1", "nonsense"),
        ("""echo '{"jobs": [{"error": 28, "write": {"bw_bytes": 5}}]}'""", "error 28"),
        ("echo '{}'", "{}"),
    ],
)
def test_a_failure_is_no_rate(answer: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fio(tmp_path / "bin", monkeypatch, answer)
    (tmp_path / "d").mkdir()
    with pytest.raises(FioError, match=text):
        measure_with_fio(tmp_path / "d", 4 << 20, 4, 4 << 20, direct=False)
    assert [*(tmp_path / "d").iterdir()] == []


def test_without_it_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure_with_fio(tmp_path, 4 << 20, 4, 4 << 20, direct=False) is None
