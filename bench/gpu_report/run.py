"""Everything that only a machine with an NVIDIA GPU can tell, by one command, in less than 20 minutes: `make gpu`.

Runs checks, then benchmarks, each in a process of its own with a limit of time; one that fails, hangs or cannot run here keeps
no other from running. Writes bench/results/DATE-gpu.jsonl, which has every sample, and DATE-gpu.md, a page to read and to send.

Exits with 1 if a check has failed, and with 2 if there is no GPU. A bar that is missed is a result, not a failure.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu_report.findings import FAIL
from bench.gpu_report.page import make_page
from bench.gpu_report.plan import Planner
from bench.gpu_report.runner import Outcome, Runner
from bench.gpu_report.sizes import Size, choose
from bench.measure.machine import ROOT, describe_run

BUDGET_S = 1140.0  # starting and ending take a little more
NO_DEVICE = (
    "nvidia-smi is there, but torch {torch} finds no device that it can use: see what nvidia-smi says of driver and GPU."
)
PRETENDED_S = (2.0, 3.0)  # of the steps whose length can be chosen: enough to see that they work
WORKLOAD = "gpu report"
NO_GPU = "make gpu needs a machine with an NVIDIA GPU and its driver, and finds no nvidia-smi here."
NO_CUDA = (
    "torch {torch} is built without CUDA: remove {venv} and name an index that has other builds, as in "
    "`make gpu TORCH_INDEX=https://download.pytorch.org/whl/cu130`."
)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all; steps without time left are named")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where the two files go")
    parser.add_argument("--directory", type=Path, default=ROOT / "out" / "gpu", help="on the disk that is to be measured")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the steps with this in their names, beside the facts")
    parser.add_argument(
        "--pretend-cuda",
        type=Path,
        metavar="LIBRARY",
        help="a stand-in for the CUDA driver, to see that all works without one",
    )
    return parser.parse_args(arguments)


class Results:
    """The two files of a run, complete after each step: whatever ends the run, what it has found stays."""

    def __init__(self, directory: Path, common: dict[str, Any], stand_in: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.outcomes: list[Outcome] = []
        self.size: Size | None = None
        self._common, self._stand_in = common, stand_in
        first = name = f"{common['date'][:10]}-gpu{'-stand-in' if stand_in else ''}"
        number = 1
        while (directory / f"{name}.jsonl").exists() or (directory / f"{name}.md").exists():
            number += 1  # what was found before stays, too
            name = f"{first}-{number}"
        self.lines, self.page = directory / f"{name}.jsonl", directory / f"{name}.md"

    def hear(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        said = f"{outcome.verdict:>12}  {outcome.step.name} ({outcome.seconds:.0f} s) {outcome.reason[:200]}"
        print(said, file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        lines = [json.dumps(line) + "\n" for outcome in self.outcomes for line in self._lines_of(outcome)]
        self.lines.write_text("".join(lines), encoding="utf-8")
        page = make_page(self._common, self.outcomes, self.size, self.lines.name, self._stand_in)
        self.page.write_text(page, encoding="utf-8")

    def _lines_of(self, outcome: Outcome) -> list[dict[str, Any]]:
        own: dict[str, Any] = {"workload": WORKLOAD, "step": outcome.step.name}
        whole = own | {"verdict": outcome.verdict, "reason": outcome.reason, "seconds": outcome.seconds, "said": outcome.said}
        findings = [own | finding | self._common for finding in outcome.findings]
        return [whole | self._common, *findings, *({**line, "step": outcome.step.name} for line in outcome.measurements)]


def run(planner: Planner, runner: Runner, results: Results, only: str) -> None:
    """All steps; the sizes of the benchmarks follow from what the first has found, and from the time that is left then."""
    facts = runner.run(planner.facts())
    for step in planner.checks():
        if only in step.name:
            runner.run(step)
    found = facts.findings[0]["figures"] if facts.findings else {}
    results.size = choose(found, runner.left_s())
    for step in planner.benchmarks(results.size):
        if only in step.name:
            runner.run(step)


def what_is_missing() -> str:
    """In one sentence, if this cannot be run here."""
    if not shutil.which("nvidia-smi"):
        return NO_GPU
    if torch.version.cuda is None:
        return NO_CUDA.format(torch=torch.__version__, venv=Path(sys.prefix).name)
    return "" if torch.cuda.is_available() else NO_DEVICE.format(torch=torch.__version__)


def stop(*_: object) -> None:
    raise SystemExit(143)


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    if not asked.pretend_cuda and (missing := what_is_missing()):
        print(missing, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stop)
    asked.directory.mkdir(parents=True, exist_ok=True)
    command = shlex.join([Path(sys.executable).name, "-m", "bench.gpu_report.run", *arguments])
    results = Results(asked.results, describe_run(asked.directory, 1.0) | {"command": command}, bool(asked.pretend_cuda))
    with tempfile.TemporaryDirectory(dir=asked.directory, prefix="run-", ignore_cleanup_errors=True) as place:
        planner = Planner(asked.pretend_cuda.resolve(), *PRETENDED_S) if asked.pretend_cuda else Planner()
        run(planner, Runner(Path(place), ROOT, asked.budget_s, results.hear), results, asked.only)
        results.write()
    print(f"\nwritten: {results.page} and {results.lines}", file=sys.stderr)
    return 1 if any(outcome.verdict == FAIL for outcome in results.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
