"""Training processes as the demonstration needs them: run to the end, or killed and resumed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]

WARM_UP = 2  # iterations at the start of each run that no median counts
CHILD_TIMEOUT_S = 600.0


class DemoFailed(Exception):
    """Something that must not happen happened; the text says what."""


@dataclass
class Run:
    """What one training process wrote into its log."""

    engine: str
    start: Record = field(default_factory=dict)
    iterations: list[Record] = field(default_factory=list)
    saves: list[Record] = field(default_factory=list)
    digest: str | None = None  # None: it did not reach its end

    @classmethod
    def read(cls, engine: str, log: Path) -> Run:
        run = cls(engine)
        for line in log.read_text().splitlines(keepends=True) if log.exists() else ():
            if line.endswith("\n"):  # a killed process may leave half a line
                run._add(json.loads(line))
        return run

    def _add(self, record: Record) -> None:
        event = record.pop("event")
        if event == "start":
            self.start = record
        elif event == "iteration":
            self.iterations.append(record)
        elif event == "save":
            self.saves.append(record)
        else:
            self.digest = record["digest"]


class Stage:
    """Where the runs happen: the flags they share, and a directory for what they write."""

    def __init__(self, iterations: int, flags: list[str], work: Path, home_rate: int) -> None:
        """
        Args:
            home_rate: bytes a second that the engine "node" carries from the disk of the node to its checkpoints.
        """
        self.iterations, self.work, self._home_rate = iterations, work, home_rate
        self._flags = [f"--iterations={iterations}", *flags]
        self._started = 0

    def spawn(self, engine: str, directory: Path, *more: str) -> tuple[subprocess.Popen[str], Path]:
        self._started += 1
        log = self.work / f"{self._started}-{engine}.jsonl"
        script = Path(__file__).with_name("train_gpt.py")
        how = ["--engine=lazy", f"--node-tier={directory}-nodes", f"--home-rate={self._home_rate}"]
        command = [sys.executable, str(script), *(how if engine == "node" else [f"--engine={engine}"])]
        command += [f"--directory={directory}", f"--events={log}", *self._flags, *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True), log

    def finish(self, engine: str, directory: Path, *more: str) -> Run:
        """Run one training to its end."""
        child, log = self.spawn(engine, directory, *more)
        try:
            code = child.wait(CHILD_TIMEOUT_S)
        finally:
            child.kill()
            child.wait()
        run = Run.read(engine, log)
        if code != 0 or run.digest is None:
            raise DemoFailed(f"the training with --engine={engine} ended with exit code {code}")
        return run

    def measure(self, engine: str) -> Run:
        directory = self.work / engine
        run = self.finish(engine, directory)
        self._remove(directory)
        failed = [save["error"] for save in run.saves if save.get("error") and not save["superseded"]]
        if failed:
            raise DemoFailed(f"a save failed: {failed[0]}")
        if engine != "none" and len(run.saves) != self.iterations:
            raise DemoFailed(f"{len(run.saves)} of {self.iterations} saves with --engine={engine}")
        return run

    def kill_and_resume(self) -> tuple[Run, Run]:
        """The run that was killed, and the one that went on from what it had saved."""
        directory = self.work / "killed"
        child, log = self.spawn("node", directory)
        try:
            self._wait_for_a_random_moment(child, log)
        finally:
            child.kill()  # SIGKILL: nothing in the process can see it come
            code = child.wait()
        if sys.stderr.isatty():
            print("  killed", file=sys.stderr)  # behind the progress bar that stopped for ever
        if code != -signal.SIGKILL:
            raise DemoFailed(f"the run to be killed ended by itself, with exit code {code}")
        killed = Run.read("node", log)
        resumed = self.finish("node", directory, "--resume")
        self._remove(directory)
        return killed, resumed

    def _remove(self, directory: Path) -> None:
        for path in (directory, directory.with_name(f"{directory.name}-nodes")):
            shutil.rmtree(path, ignore_errors=True)

    def _wait_for_a_random_moment(self, child: subprocess.Popen[str], log: Path) -> None:
        enough = random.randint(WARM_UP + 1, max(WARM_UP + 1, self.iterations - 3))
        deadline = time.monotonic() + CHILD_TIMEOUT_S
        while len(seen := Run.read("node", log).iterations) < enough:
            if child.poll() is not None:
                return
            if time.monotonic() > deadline:
                raise DemoFailed("the run to be killed makes no progress")
            time.sleep(0.005)
        time.sleep(random.uniform(0.0, seen[-1]["seconds"]))
