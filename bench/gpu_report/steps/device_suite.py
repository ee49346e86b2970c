"""The tests of tests/devices/test_hardware.py, one finding each: what ran before a hang is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.gpu_report.findings import FAIL, PASS, SKIPPED, Findings, step_parser
from bench.gpu_report.plan import DEVICE_TESTS
from bench.measure.machine import ROOT

REASON_CHARACTERS = 600


class Recorder:
    """A plugin of pytest."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        if report.failed:
            self._findings.add(
                name, FAIL, f"{report.when}: {str(report.longrepr)[-REASON_CHARACTERS:]}", seconds=report.duration
            )
        elif report.skipped:
            self._findings.add(
                name, SKIPPED, str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            )
        elif report.when == "call":
            self._findings.add(name, PASS, seconds=report.duration)


def main(arguments: list[str]) -> int:
    parser = step_parser(__doc__)
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="as pytest's -k")
    asked = parser.parse_args(arguments)
    base = Path(asked.directory) / "pytest"
    command = [
        str(ROOT / DEVICE_TESTS),
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={base}",
        f"--rootdir={ROOT}",
        "-k",
        asked.only,
    ]
    return int(pytest.main(command, plugins=[Recorder(Findings(asked.out))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
