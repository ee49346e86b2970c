"""The simulation held against real saves on this machine.

Rates and fixed costs come from the first case alone, whose iterations are long enough to hide everything (and from a loop that
copies memory). The others, where training must wait for the disk, for the arena or for earlier saves, are predicted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.rate_limit import limited
from bench.measure.report import Report
from bench.measure.sampling import MIB, Sample, Settings
from bench.simulation.model import HOST, Cluster, Job, Outcome, Saving
from bench.simulation.rank import simulate

TIMEOUT_S = 900.0
COMPUTE_OVER_FLUSH = (2.0, 0.75, 0.4, 0.1)  # the first one calibrates
ARENA_OVER_STATE = (2.0, 0.25)
ITERATIONS = 5
STATE_BYTES = 128 * MIB
GUESSED_RATE = 1.5e9  # bytes per second of an unlimited disk, only to choose how long an iteration is


class Measured(NamedTuple):
    """One case, and what the real saves did."""

    compute_s: float
    arena_bytes: int
    iterations: int
    found: dict[str, Any]

    def median(self, name: str) -> float:
        return statistics.median(row[name] for row in self.found["saves"])


def validate(settings: Settings, report: Report, rate: int | None) -> list[tuple[str, ...]]:
    """Measures, predicts, adds lines; returns rows of a table.

    Args:
        rate: bytes per second to which the disk is limited, so that it is as steady as the model's; None: the disk itself.

    Raises:
        RuntimeError: the measured process failed; the message says what it said.
    """
    with settings.workspace() as directory:
        nbytes, copy, cases = measure(directory, settings.sized(STATE_BYTES), settings.rounds_or(ITERATIONS), rate)
    first = cases[0]
    cluster = Cluster(copy=copy, file_system=rate or nbytes / first.median("flush_s"))
    flush_s = nbytes / cluster.file_system
    costs = {
        "plan_s": first.median("save_s"),
        "fsync_s": max(0.0, first.median("flush_s") - flush_s - first.median("save_s")),
        "publish_s": first.median("commit_s"),
    }
    rows = [("disk", "compute s", "arena MiB", "blocked s: real", "model", "error", "whole run s: real", "model", "error")]
    disk = "the disk itself" if rate is None else f"{rate / 1e6:g} MB/s"
    for number, case in enumerate(cases):
        job = Job(nbytes, case.compute_s, 0.0, iterations=case.iterations, source=HOST)
        predicted = simulate(cluster, job, Saving(arena_bytes=case.arena_bytes, **costs))
        role = "calibrates" if number == 0 else "predicted"
        rows.append(compare(report, disk, role, case, predicted, nbytes))
    return rows


def measure(directory: Path, state_bytes: int, iterations: int, rate: int | None) -> tuple[int, float, list[Measured]]:
    """(bytes of the state, bytes per second of copying, the cases)."""
    flush_s = state_bytes / (rate or GUESSED_RATE)
    shapes = [
        (factor * flush_s, max(MIB, int(part * state_bytes))) for part in ARENA_OVER_STATE for factor in COMPUTE_OVER_FLUSH
    ]
    cases = [{"compute_s": compute_s, "arena_bytes": arena, "iterations": iterations} for compute_s, arena in shapes]
    plan, out = directory / "plan.json", directory / "results.json"
    fields = {"directory": str(directory / "saved"), "results": str(out), "state_bytes": state_bytes, "cases": cases}
    plan.write_text(json.dumps(fields), encoding="utf-8")
    environment = dict(os.environ) if rate is None else limited(os.environ, rate, directory)
    command = [sys.executable, "-m", "bench.simulation.real_saves", str(plan)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"the measured saves failed:\n{done.stderr[-4000:]}")
    found = json.loads(out.read_text(encoding="utf-8"))
    measured = [Measured(**case, found=seen) for case, seen in zip(cases, found["cases"], strict=True)]
    return found["nbytes"], found["copy_rate"], measured


def compare(report: Report, disk: str, role: str, case: Measured, predicted: Outcome, nbytes: int) -> tuple[str, ...]:
    real = [row["save_s"] + row["fence_s"] for row in case.found["saves"]]
    model = predicted.blocked()
    name = f"validation, {disk}, compute {case.compute_s:.3g} s, arena {case.arena_bytes / MIB:.4g} MiB"
    runs = {"real": case.found["ended_s"], "model": predicted.ended_s}
    detail = {"role": role, "real_blocked_s": real, "whole_run_s": runs}
    samples = [Sample(saves.begun_at, {"blocked_s": blocked}) for saves, blocked in zip(predicted.saves[0], model, strict=True)]
    how = "simulated; detail.real_blocked_s are clocks around save() and ckpt.fence() of real saves, a sleep between them"
    report.add("simulation", name, "s", samples, nbytes=nbytes, how=how, **detail)
    blocked = sum(real) / len(real), sum(model) / len(model)
    return (
        disk, f"{case.compute_s:.3g}", f"{case.arena_bytes / MIB:.4g}",
        f"{blocked[0]:.4g}", f"{blocked[1]:.4g}", role if role == "calibrates" else error(*blocked),
        f"{runs['real']:.4g}", f"{runs['model']:.4g}", error(runs["real"], runs["model"]),
    )  # fmt: skip


def error(real: float, model: float) -> str:
    return f"{model / real - 1.0:+.1%}"
