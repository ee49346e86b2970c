"""Runs steps one after the other, each in a process of its own, whatever becomes of those before; keeps a budget of time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_report.findings import FAIL, INCONCLUSIVE, NOT_RUN, PASS, SKIPPED, read, worst

SAID_LINES = 30  # that are kept of what a step has said
END_WAIT_S = 10.0  # for a process that has been killed; one that hangs inside the driver may never end


@dataclasses.dataclass(frozen=True)
class Step:
    """
    Attributes:
        command: `{out}` in it is the file for its lines; `{directory}` an empty directory, which is removed afterwards.
        limit_s: it is ended then, with all processes that it has started.
        least_s: with less time left it is not begun.
        environment: on top of this process's.
        skip: why it cannot run here.
        late: the verdict if it is ended for its limit.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    least_s: float = 5.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skip: str = ""
    late: str = FAIL


@dataclasses.dataclass
class Outcome:
    """
    Attributes:
        lines: that the step has written.
        said: the end of what it has said.
    """

    step: Step
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    said: str = ""

    @property
    def findings(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "check" in line]

    @property
    def measurements(self) -> list[dict[str, Any]]:
        """Lines of bench.run."""
        return [line for line in self.lines if "check" not in line]


class Runner:
    """
    Args:
        place: where the steps work, on the disk that is to be measured.
        root: where they are started.
        budget_s: for all of them.
        heard: is told of each outcome.
    """

    def __init__(self, place: Path, root: Path, budget_s: float, heard: Callable[[Outcome], None]) -> None:
        self._place, self._root, self._heard = place, root, heard
        self._ends = time.monotonic() + budget_s
        self._count = 0

    def left_s(self) -> float:
        return self._ends - time.monotonic()

    def run(self, step: Step) -> Outcome:
        outcome = self._run(step)
        self._heard(outcome)
        return outcome

    def _run(self, step: Step) -> Outcome:
        if step.skip:
            return Outcome(step, SKIPPED, step.skip)
        left_s = self.left_s()
        if left_s < step.least_s:
            reason = f"{max(0.0, left_s):.0f} s of the time for all were left, and it needs {step.least_s:.0f} s"
            return Outcome(step, NOT_RUN, reason)
        self._count += 1
        directory = self._place / f"step{self._count}"
        directory.mkdir(parents=True)
        out, said = self._place / f"step{self._count}.jsonl", self._place / f"step{self._count}.txt"
        limit_s = min(step.limit_s, left_s)
        began = time.monotonic()
        status = self._process(step, directory, out, said, limit_s)
        outcome = Outcome(step, PASS, seconds=time.monotonic() - began, lines=read(out), said=last_lines(said))
        outcome.verdict, outcome.reason = judge(outcome, status, limit_s)
        shutil.rmtree(directory, ignore_errors=True)  # what cannot be removed now goes with the place itself
        return outcome

    def _process(self, step: Step, directory: Path, out: Path, said: Path, limit_s: float) -> int | None:
        """The exit status; None: it was ended for its limit. Nothing of it goes on."""
        command = [word.replace("{out}", str(out)).replace("{directory}", str(directory)) for word in step.command]
        with said.open("wb") as file:
            try:
                process = subprocess.Popen(
                    command, cwd=self._root, env=os.environ | dict(step.environment), start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                )  # fmt: skip
            except OSError as error:
                file.write(f"{error}\n".encode())
                return 127
            try:
                return process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return None
            finally:
                kill_session(process)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """The step and what it has started, as far as that has stayed in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_WAIT_S)


def judge(outcome: Outcome, status: int | None, limit_s: float) -> tuple[str, str]:
    """The verdict on a step, and why it is no pass."""
    step, findings = outcome.step, outcome.findings
    bad = [f"{each['check']}: {each['reason']}" for each in findings if each["verdict"] in (FAIL, INCONCLUSIVE)]
    if status is None:
        at_limit = limit_s >= step.limit_s
        reason = f"it had not ended after {limit_s:.0f} s" + ("" if at_limit else ", when the time for all was over")
        failed = any(each["verdict"] == FAIL for each in findings)
        return FAIL if failed else (step.late if at_limit else INCONCLUSIVE), "; ".join([reason, *bad])
    if status != 0 and not any(each["verdict"] == FAIL for each in findings):
        ended = f"signal {-status}" if status < 0 else f"exit status {status}"
        return FAIL, "; ".join([f"it ended with {ended}", *bad])
    if not outcome.lines:
        return FAIL, "it has written nothing"
    verdict = worst([each["verdict"] for each in findings]) if findings else PASS
    if verdict == SKIPPED:
        bad = [each["reason"] for each in findings]
    return verdict, "; ".join(bad)


def last_lines(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-SAID_LINES:])
