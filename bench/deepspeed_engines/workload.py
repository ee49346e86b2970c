"""Every checkpoint engine that DeepSpeed ships and that runs here, beside ours: one job, the same state, in turn."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure.report import Bar, Report
from bench.measure.sampling import MIB, Sample, Settings, column

STATE_BYTES = 700 * MIB
ITERATION_S = 1.5  # forward + backward of the compute-bound setting takes at least so long
TIMEOUT_S = 1800
SMALL = 0.1  # below this scale only our memory is looked at
NO_SAVING, FLOOR, OURS, TORCH = "no saving", "nothing written", "ckpt", "TorchCheckpointEngine"
SETTINGS = ("compute-bound", "flush-bound")
BLOCKED, END_TO_END, TOTAL = Bar("<=", 1 / 48), Bar("<=", 1.05), Bar("<=", 1 / 2.2)

JOB = "2 ranks, ZeRO 1, bf16 with fp32 master weights, each figure that of the slowest rank"
SYNCED = "what the engine does not fsync is fsynced by this program once it is complete, inside the clock"
HOW = {
    "call_s": f"clock around save_checkpoint(); nothing else runs; {JOB}",
    "durable_s": f"clock from the call of save_checkpoint(), with no training behind it, until the files of all ranks and "
    f"`latest` are on the disk; {SYNCED}; {JOB}",
    "total_s": f"clock around a block of iterations, each beginning with a save, until the last is durable; {SYNCED}, for the "
    f"last checkpoint only; removing old ones is outside of the clock; {JOB}",
    "blocked_s": "clock around save_checkpoint(), plus clock around what DeepSpeed's step() does for the checkpoint before it "
    f"updates (the fence, or the commit of a decoupled engine); {JOB}",
    "blocked_with_step_s": "clock around save_checkpoint(), plus clock around the step() behind it, less the median of step() "
    f"without saving: the noise of a step is in it; {JOB}",
    "iteration_s": f"clock around forward, backward and step, without save_checkpoint(); {JOB}",
    "forward_backward_s": f"clock around forward and backward; {JOB}",
    "extra_MiB": "proportional set size of both ranks and all their children together, looked at every 30 ms in a job of its "
    "own: the peak over iterations with saves, less the median peak of the same iterations without",
}

Results = dict[str, Any]


def measure_deepspeed(settings: Settings, report: Report) -> None:
    """
    Raises:
        RuntimeError: deepspeed is not installed, or the measured job failed; the message says what it said.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RuntimeError("deepspeed is not installed (pip install deepspeed)")
    with settings.workspace() as directory:
        results = run_child(settings, directory)
    for side, error in results["errors"].items():
        print(f"\n{side} cannot run here: {error}", file=sys.stderr)
        sample = Sample(results["alone"][OURS][0]["started_s"], {"runs_here": 0.0})
        report.add("deepspeed", side, "1", [sample], nbytes=results["nbytes"], how=f"not measured: {error}", error=error)
    add_alone(report, results)
    for setting in SETTINGS:
        add_setting(report, results, setting)
    add_memory(report, results)
    for line in report.lines:
        if line["workload"] == "deepspeed":
            line["versions"] = line["versions"] | {"deepspeed": importlib.metadata.version("deepspeed")}


def run_child(settings: Settings, directory: Path) -> Results:
    plan, out, log = directory / "plan.json", directory / "results.json", directory / "log"
    rounds = settings.rounds_or(3)
    fields = {
        "directory": str(directory),
        "results": str(out),
        "state_bytes": settings.sized(STATE_BYTES),
        "rivals": list(settings.rivals),
        "rest_s": settings.rest_s,
        "iteration_s": settings.iteration_s or ITERATION_S,
        "alone_rounds": rounds + 1 if settings.rounds is None else rounds,
        "rounds": rounds,
        "watched": [NO_SAVING, OURS] if settings.scale < SMALL else [],
        "compute_length": 3,
        "flush_length": 5,
    }
    plan.write_text(json.dumps(fields), encoding="utf-8")
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.deepspeed_engines.measure", str(plan)]
    with log.open("w", encoding="utf-8") as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            status = child.wait(TIMEOUT_S)
        finally:
            end_group(child)
    if status != 0:
        raise RuntimeError(f"the measured job failed:\n{log.read_text(encoding='utf-8')[-4000:]}")
    results: Results = json.loads(out.read_text(encoding="utf-8"))
    return results


def end_group(child: subprocess.Popen[bytes]) -> None:
    """The program, its ranks and their writer processes, whatever is left of them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# ---- lines -----------------------------------------------------------------------------------------------------------


def samples_of(rows: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(row["started_s"], row["values"]) for row in rows]


def add_alone(report: Report, results: Results) -> None:
    for side, rows in results["alone"].items():
        samples, right = samples_of(rows), results["right"].get(side)
        for quantity in samples[0].values:
            how, detail = HOW[quantity], {"file_holds_what_was_saved": right}
            report.add("deepspeed", side, "s", column(samples, quantity), nbytes=results["nbytes"], how=how, **detail)
    samples = {side: samples_of(rows) for side, rows in results["alone"].items()}
    for side in (side for side in samples if side not in (OURS, FLOOR)):
        pair = column(samples[OURS], "durable_s"), column(samples[side], "durable_s")
        report.add_ratio("deepspeed", f"ckpt / {side}, durable", *pair, nbytes=results["nbytes"], how="durable_s of both")


def add_setting(report: Report, results: Results, setting: str) -> None:
    measured = results[setting]
    blocks, nbytes = measured["blocks"], results["nbytes"]
    shape = {"iterations": measured["length"], "micro_steps": measured["micro_steps"], "flush_alone_s": results["flush_s"]}
    step_s = statistics.median(row["values"]["step_s"] for row in iterations_of(blocks[NO_SAVING]))
    for side, rows in blocks.items():
        add = partial(report.add, "deepspeed", f"{setting}: {side}", "s", nbytes=nbytes)
        add(samples_of(rows), how=HOW["total_s"], **shape)
        iterations = samples_of([with_extra_step(row, step_s) for row in iterations_of(rows)])
        detail = {"stats_medians": measured["stats"]} if side == OURS else {}
        names = (
            ("iteration_s", "forward_backward_s") if side == NO_SAVING else ("blocked_s", "blocked_with_step_s", "iteration_s")
        )
        for name in names:
            add(column(iterations, name), how=HOW[name], **detail)
    for side in blocks:
        if side != OURS:
            add_ratios(report, results, setting, side, step_s)


def add_ratios(report: Report, results: Results, setting: str, side: str, step_s: float) -> None:
    blocks = results[setting]["blocks"]
    ratio = partial(report.add_ratio, "deepspeed", nbytes=results["nbytes"])
    bars = {("compute-bound", NO_SAVING): END_TO_END, ("flush-bound", TORCH): TOTAL}
    ours, theirs = samples_of(blocks[OURS]), samples_of(blocks[side])
    ratio(f"{setting}: ckpt / {side}, total", ours, theirs, how="total_s of both", bar=bars.get((setting, side)))
    if side == NO_SAVING:
        return
    above, below = (samples_of([with_extra_step(r, step_s) for r in iterations_of(blocks[name])]) for name in (OURS, side))
    for name in ("blocked_s", "blocked_with_step_s") if side == TORCH else ("blocked_s",):
        bar = BLOCKED if (setting, side, name) == ("compute-bound", TORCH, "blocked_s") else None
        case = f"{setting}: ckpt / {side}, {name[:-2].replace('_', ' ')}"
        ratio(case, column(above, name), column(below, name), how=f"{name} of both", bar=bar)


def iterations_of(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for block in blocks for row in block["iterations"]]


def with_extra_step(row: dict[str, Any], step_s: float) -> dict[str, Any]:
    values = row["values"]
    return row | {"values": values | {"blocked_with_step_s": values["save_and_step_s"] - step_s}}


def add_memory(report: Report, results: Results) -> None:
    memory = {side: samples_of(rows) for side, rows in results["memory"].items()}
    base = statistics.median(sample.values["peak_bytes"] for sample in memory[NO_SAVING])
    for side, samples in memory.items():
        if side == NO_SAVING:
            continue
        extra = [Sample(s.started_s, {"extra_MiB": (s.values["peak_bytes"] - base) / MIB}) for s in samples]
        children = [sample.values["children_bytes"] / MIB for sample in samples]
        detail = {"no_saving_peak_MiB": base / MIB, "of_it_in_children_MiB": children}
        report.add("deepspeed", f"{side}, memory", "MiB", extra, nbytes=results["nbytes"], how=HOW["extra_MiB"], **detail)
