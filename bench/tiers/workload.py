"""The same job beside a slow home: without saving, saving there, and by way of its node's disk."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ckpt
from bench.measure.ranks import environment_of_ranks, torchrun
from bench.measure.ranks import run_job as run_ranks
from bench.measure.rate_limit import limited
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, MIB, Sample, Settings, Side, Values, clock, interleave, note
from bench.tiers.beside_drain import COPY, DRAIN, IDLE, KINDS
from bench.tiers.recovery import LOCAL, LOST, NODES
from ckpt.drain import journal as journals

STATE_BYTES = 1 * GIB
EVERY = 5
SAVES = 6
SLOWER = 10  # home is so many times slower than the disk
TIMEOUT_S = 900
PARTS = ("training", "drain", "recovery")
NOTHING, FAST, SLOW, NODE = "no saving", "fast home", "slow home", "node, slow home"

HOW = (
    "a job of its own: forward, backward, step, and save() every 5th iteration; writes to home are held to a tenth of the "
    "disk's rate by a preloaded library, in the job and in its drain"
)


def measure_tiers(settings: Settings, report: Report) -> None:
    """The parts that are asked for: jobs that save, iterations beside the drain, restoring.

    Raises:
        ValueError: there is no such part.
    """
    parts = settings.parts or PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"there is no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    nbytes = settings.sized(STATE_BYTES)
    with settings.workspace() as directory:
        rate = measure_disk(directory, nbytes)
        limit = int(rate / SLOWER)
        note(f"the disk writes {rate / MIB:.0f} MiB/s, home {limit / MIB:.0f} MiB/s")
        if "training" in parts:
            sides = [Side(case, partial(run_job, case, nbytes, directory, limit)) for case in (NOTHING, FAST, SLOW, NODE)]
            samples = interleave(sides, settings.rounds_or(3), settings.settle, warmup=0)
            add_training(report, samples, nbytes, rate, limit)
            report.flush()
        if "drain" in parts:
            add_beside_drain(settings, report, directory, nbytes, limit)
            report.flush()
        if "recovery" in parts:
            add_recovery(settings, report, directory, nbytes)
            add_recovery_of_nodes(settings, report, directory, nbytes)


def measure_disk(directory: Path, nbytes: int) -> float:
    """Bytes a second of a save of ours to this disk, durable: what the node could do."""
    state = {f"tensor{number}": torch.randn(nbytes // 64 // 4) for number in range(64)}
    seconds = []
    for _ in range(3):
        os.sync()
        began = clock()
        ckpt.save(state, directory / "disk.pt", lazy=True).result()
        seconds.append(clock() - began)
    (directory / "disk.pt").unlink()
    return nbytes / statistics.median(seconds)


def run_job(case: str, nbytes: int, directory: Path, limit: int) -> Values:
    with tempfile.TemporaryDirectory(dir=directory) as made:
        home, node = Path(made, "home"), Path(made, "node")
        save = {NOTHING: "nothing", FAST: "home", SLOW: "home", NODE: "node"}[case]
        command = ["bench.tiers.job", str(home), "--save", save, "--node", str(node), "--bytes", str(nbytes)]
        command += ["--iterations", str(EVERY * (SAVES + 1)), "--every", str(EVERY)]
        found: Values = measured_by(command, limit if case in (SLOW, NODE) else None, home, directory)
        if case == NODE:
            found |= carried(node, home)
    return found


def measured_by(module: list[str], limit: int | None, home: Path, directory: Path) -> Any:
    """What a program of this package prints as JSON; writes to home are held to `limit` bytes a second."""
    environment: dict[str, str] = dict(os.environ)
    if limit is not None:
        environment = limited(environment, limit, directory, below=home)
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the measured job failed: {done.stderr}")
    return json.loads(done.stdout)


def carried(node: Path, home: Path) -> Values:
    """Of what the drain has noted: bytes that it has read from the node, and those of what came home."""
    (root,) = node.iterdir()
    noted = journals.read_all(root)
    copied = sum(journal.bytes for journal in noted)
    arrived = sum(journal.total for journal in noted if journal.state == journals.COMMITTED)
    return {"copied_bytes": copied, "arrived_bytes": arrived}


def add_training(report: Report, samples: dict[str, list[Sample]], nbytes: int, rate: float, limit: int) -> None:
    detail: dict[str, Any] = {"disk_bytes_per_s": rate, "home_bytes_per_s": limit}

    def column(case: str, name: str) -> list[Sample]:
        return [Sample(sample.started_s, {name: sample.values[name]}) for sample in samples[case]]

    def more(**others: Any) -> dict[str, Any]:
        return {"nbytes": nbytes, "how": HOW, **others, **detail}

    for case in (FAST, SLOW, NODE):
        report.add("tiers", f"blocked for each save, {case}", "s", column(case, "blocked_s"), **more())
    for case in samples:
        report.add("tiers", f"iteration, {case}", "s", column(case, "iteration_s"), **more())
    lost = {
        case: [
            Sample(mine.started_s, {"lost_s": max(1e-3, mine.values["total_s"] - idle.values["total_s"])})
            for mine, idle in zip(samples[case], samples[NOTHING], strict=True)
        ]
        for case in (FAST, SLOW, NODE)
    }
    for case, seconds in lost.items():
        report.add("tiers", f"lost by saving, {case}", "s", seconds, **more())
    report.add_ratio("tiers", "lost: slow home / by way of the node", lost[SLOW], lost[NODE], **more(bar=Bar(">=", 5)))
    iterations = {case: column(case, "iteration_s") for case in (FAST, NODE)}
    report.add_ratio("tiers", "iteration: by way of the node / fast home", iterations[NODE], iterations[FAST], **more())
    durable = [
        Sample(sample.started_s, {"share": sample.values["bytes_saved"] / sample.values["durable_s"] / rate})
        for sample in samples[NODE]
    ]
    report.add("tiers", "durable on the node: rate / the disk's", "1", durable, **more(bar=Bar(">=", 0.9)))
    copied = [
        Sample(each.started_s, {"copies": each.values["copied_bytes"] / each.values["arrived_bytes"]}) for each in samples[NODE]
    ]
    superseded = [each.values["superseded"] for each in samples[NODE]]
    report.add("tiers", "bytes copied / bytes that came home", "1", copied, **more(bar=Bar("<=", 1.0), superseded=superseded))


def add_beside_drain(settings: Settings, report: Report, directory: Path, nbytes: int, limit: int) -> None:
    """What the drain costs an iteration, in one process: see beside_drain.py."""
    rounds = settings.rounds_or(5)
    note("iterations beside the drain")
    with tempfile.TemporaryDirectory(dir=directory) as made:
        home = Path(made, "home")
        command = ["bench.tiers.beside_drain", str(home), "--node", str(Path(made, "node")), "--bytes", str(nbytes)]
        began = clock()
        found = measured_by([*command, "--rounds", str(rounds)], limit, home, directory)
    how = "mean of the iterations of one job, in turn five while its drain is at work, while it is stopped, while dd copies"
    samples = {kind: [Sample(began, {"iteration_s": each[kind]}) for each in found] for kind in KINDS}
    detail = {name: [each[name] for each in found] for name in ("iterations", "rate")}
    more: dict[str, Any] = {"nbytes": nbytes, "how": how, "home_bytes_per_s": limit} | detail
    name = "iteration: beside the drain / without"
    report.add_ratio("tiers", name, samples[DRAIN], samples[IDLE], bar=Bar("<=", 1.02), **more)
    name = "iteration: beside dd at the same rate / without"
    report.add_ratio("tiers", name, samples[COPY], samples[IDLE], **more)


def add_recovery(settings: Settings, report: Report, directory: Path, nbytes: int) -> None:
    """From the node, beside the same files read where a job without tiers has them."""
    home, node = directory / "home", directory / "node"
    state = {f"tensor{number}": torch.randn(nbytes // 64 // 4) for number in range(64)}
    with ckpt.Checkpointer(home, tiers=[ckpt.Tier.node(node)]) as checkpointer:
        checkpointer.save(1, state).result()
    sides = [Side("home", partial(restore, home, [])), Side("node", partial(restore, home, [ckpt.Tier.node(node)]))]
    samples = interleave(sides, settings.rounds_or(5), settings.settle)
    how = "clock around restore() in one process, after the page cache was asked to drop the files"
    report.add_ratio(
        "tiers", "restore: node / home", samples["node"], samples["home"], nbytes=nbytes, how=how, bar=Bar("<=", 1.2)
    )


def add_recovery_of_nodes(settings: Settings, report: Report, directory: Path, nbytes: int) -> None:
    """Two ranks, half of the state each: see recovery.py."""
    note("recovery of two nodes")
    with tempfile.TemporaryDirectory(dir=directory) as made:
        out = Path(made, "found.json")
        arguments = [made, "--bytes", str(nbytes // 2), "--rounds", str(settings.rounds_or(5)), "--out", str(out)]
        began = clock()
        run_ranks([*torchrun(2), "-m", "bench.tiers.recovery", *arguments], environment_of_ranks())
        found = json.loads(out.read_text(encoding="utf-8"))
    samples = {name: [Sample(began, {"restore_s": seconds}) for seconds in found[name]] for name in (LOCAL, NODES, LOST)}
    how = "two ranks on two directories as nodes, the slower of both; page cache dropped; beside ckpt.load of the own file"
    for case in (NODES, LOST):
        name = f"restore of 2 ranks, {case} / {LOCAL}"
        report.add_ratio("tiers", name, samples[case], samples[LOCAL], nbytes=nbytes, how=how, bar=Bar("<=", 1.2))


def restore(home: Path, tiers: list[ckpt.Tier]) -> Values:
    for path in (*home.rglob("*.pt"), *(file for tier in tiers for file in tier.path.rglob("*.pt"))):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ckpt.Checkpointer(home, tiers=tiers) as checkpointer:
        began = clock()
        found = checkpointer.restore()
        seconds = clock() - began
    if found is None:
        raise RuntimeError("nothing was restored")
    return {"restore_s": seconds}
