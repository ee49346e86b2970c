"""The short program under a tool of NVIDIA's compute-sanitizer: memcheck, initcheck."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bench.gpu_report.findings import FAIL, INCONCLUSIVE, PASS, Findings, read, step_parser

ERRORS_STATUS = 86  # of the tool, if it has found errors; the program's own otherwise
LOG_CHARACTERS = 1500
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")


def main(arguments: list[str]) -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--tool", required=True)
    asked = parser.parse_args(arguments)
    log, inner = asked.directory / "sanitizer.log", asked.directory / "program.jsonl"
    command = [
        *("compute-sanitizer", "--tool", asked.tool, "--error-exitcode", str(ERRORS_STATUS), "--log-file", str(log)),
        *("--report-api-errors", "no"),  # torch tries calls that a driver may not have
        *(sys.executable, "-m", "bench.gpu_report.steps.save_and_restore"),
        *("--out", str(inner), "--directory", str(asked.directory)),
    ]
    if asked.pretend_cuda:
        command.append(f"--pretend-cuda={asked.pretend_cuda}")
    status = subprocess.run(command).returncode
    findings = Findings(asked.out)
    report(findings, asked.tool, status, log)
    for each in read(inner):
        findings.add(f"{each['check']}, under {asked.tool}", each["verdict"], each["reason"], **each["figures"])


def report(findings: Findings, tool: str, status: int, log: Path) -> None:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    summary = SUMMARY.search(text)
    errors = None if summary is None else int(summary[1])
    if status == ERRORS_STATUS or errors:
        findings.add(tool, FAIL, f"it has found errors: {text[:LOG_CHARACTERS]}", errors=errors)
    elif errors is None:
        findings.add(tool, INCONCLUSIVE, f"exit status {status}, without a summary: {text[:LOG_CHARACTERS]}")
    elif status != 0:
        findings.add(tool, FAIL, f"no errors found, but the program ended with exit status {status}", errors=errors)
    else:
        findings.add(tool, PASS, errors=errors)


if __name__ == "__main__":
    main(sys.argv[1:])
