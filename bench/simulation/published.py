"""The published setting, simulated. Every number of the model has its source here."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.report import Report
from bench.measure.sampling import Sample, note
from bench.simulation.model import Cluster, Job, Outcome, Saving
from bench.simulation.rank import simulate

RESULTS = Path(__file__).parents[1] / "results"

# Maurya et al., "DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models", HPDC 2024 (arXiv 2406.10707), on
# Polaris: 4 A100 a node, 25 GB/s from each to pinned memory, Lustre with 650 GB/s, 64 GB of host memory a node for checkpoints.
POLARIS = Cluster(gpus_per_node=4, d2h=25e9, node_link=25e9, file_system=650e9, servers=160, jitter=0.1)
ARENA_PER_NODE = 64 * 10**9
NODE_DISK = 4e9  # bytes a second
DRAIN_RATE, RECEIPT_S = 1.2e9, 0.5e-3

SOURCES = {
    "d2h": "25 GB/s for each GPU, pinned: DataStates-LLM, HPDC'24",
    "file_system": "650 GB/s, Lustre of Polaris: DataStates-LLM, HPDC'24",
    "servers": "160 object storage targets, as the Lustre of Polaris has: assumption, not in the paper's tables",
    "arena": "64 GB of each node for checkpoints, shared evenly by its GPUs: DataStates-LLM, HPDC'24",
    "node_link": "25 GB/s: assumption (two network cards of 100 Gbit/s); what one node reached is not published",
    "jitter": "0.1: spread of the durable rate on one machine, bench/results, workload durable",
    "gather_s, verdict_s, node_s": "bench/results, workload coordination, torch store, by node; 64 to 16,384 ranks",
    "decide_s": "bench/results, workload coordination, rank 0 decides; 1,024 to 16,384 ranks",
    "plan_s": "7 ms: bench/results, workload stall, save_s",
    "publish_s, fsync_s": "20 ms and 10 ms: assumption, some ten metadata operations of 2 ms",
    "node_disk": "4 GB/s: assumption, the two NVMe disks of a node of Polaris at 2 GB/s each; only with a tier of nodes",
    "drain_rate": "1.2 GB/s: what the drain copied here, where the disk was the limit (bench/results, workload tiers)",
    "receipt_s": "0.5 ms to read what a node has delivered: assumption, a small file at home",
    "schedule": "one save an iteration, five iterations: assumption",
}
PLAN_S, PUBLISH_S, FSYNC_S = 0.007, 0.020, 0.010
CHUNKS = 64  # of a rank: the simulation's grain


class Model(NamedTuple):
    """A row of the paper: seconds of one iteration, bytes of one checkpoint, and its rate: bytes over time blocked."""

    name: str
    gpus: int
    checkpoint_gb: float
    forward_s: float
    backward_s: float
    update_s: float
    published_gb_per_s: float

    @property
    def iteration_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s

    def job(self, gpus: int | None = None, **changes: Any) -> Job:
        """Args:
        gpus: that share the checkpoint; None: as published.
        """
        nbytes = int(self.checkpoint_gb * 1e9) // (gpus or self.gpus)
        return dataclasses.replace(Job(nbytes, self.forward_s, self.backward_s, self.update_s), **changes)


PUBLISHED = (
    Model("3B", 4, 45, 0.81, 0.79, 0.10, 135),
    Model("7B", 8, 83, 1.26, 1.82, 0.12, 223),
    Model("13B", 16, 166, 1.85, 3.56, 0.09, 234),
    Model("30B", 32, 444, 3.72, 8.58, 0.11, 395),
    Model("70B", 80, 1065, 6.71, 16.82, 0.07, 638),
)


MEASURED_PER_NODE = 8  # ranks


def measured_commit(ranks: int, by_node: bool = False, results: Path = RESULTS) -> dict[str, float]:
    """What a message costs rank 0's coordinator, and a rank's answer rank 0: of the newest measurement whose number of ranks is
    nearest; see Saving.

    Raises:
        ValueError: there are no such results.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted(results.glob("*.jsonl")):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line["workload"] == "coordination":
                way, _, size = line["case"].removesuffix(" ranks").rpartition(", ")
                found.setdefault(way, {}).setdefault(int(size), {})[line["quantity"]] = line["median"]
    way, per_message = ("torch by node", MEASURED_PER_NODE) if by_node else ("torch", 1)
    if way not in found:
        raise ValueError(f"no results of the workload 'coordination' in {results}; measure with bench.run")

    def nearest(way: str) -> tuple[int, dict[str, float]]:
        size = min(found[way], key=lambda size: abs(math.log(size / ranks)))
        return size, found[way][size]

    size, seconds = nearest(way)
    gathered, agreed = seconds["gathered_s"], seconds["agreed_s"]
    messages = size / per_message
    node_s = found["one node, torch"][MEASURED_PER_NODE]["agreed_s"] if by_node else 0.0
    decided, alone = nearest("rank 0 decides")
    decide_s = alone["decided_s"] / decided
    return {
        "gather_s": gathered / messages,
        "verdict_s": (agreed - gathered) / messages,
        "node_s": node_s,
        "decide_s": decide_s,
    }


def flat(saving: Saving, cluster: Cluster) -> Saving:
    """The same, but each rank makes a message of its own."""
    return dataclasses.replace(saving, by_node=False, **measured_commit(cluster.ranks))


def saving_for(cluster: Cluster) -> Saving:
    """By node, once that has been measured; else flat."""
    by_node = cluster.gpus_per_node > 1
    try:
        costs = measured_commit(cluster.ranks, by_node)
    except ValueError:
        by_node, costs = False, measured_commit(cluster.ranks)
    return Saving(
        arena_bytes=ARENA_PER_NODE // cluster.gpus_per_node,
        most_chunks=CHUNKS,
        plan_s=PLAN_S,
        fsync_s=FSYNC_S,
        publish_s=PUBLISH_S,
        by_node=by_node,
        **costs,
        drain_rate=DRAIN_RATE,
        receipt_s=RECEIPT_S,
    )


def add_line(report: Report, case: str, outcome: Outcome, nbytes: int, **detail: Any) -> None:
    """One line: how long each save has held training up; the rest of what was seen as detail."""
    starts = [ranks[0].begun_at for ranks in zip(*outcome.saves, strict=True)]
    samples = [Sample(at, {"blocked_s": blocked}) for at, blocked in zip(starts, outcome.blocked(), strict=True)]
    durable = [max(save.durable_at - save.begun_at for save in saves) for saves in zip(*outcome.saves, strict=True)]
    seen = {"overhead": outcome.overhead, "durable_s": durable, "arena_peak_bytes": outcome.arena_peak}
    report.add("simulation", case, "s", samples, nbytes=nbytes, how="simulated, see detail", **seen, **detail)


# ---- the published setting -------------------------------------------------------------------------------------------


def published(report: Report, models: Sequence[Model] = PUBLISHED) -> list[tuple[str, ...]]:
    """Adds lines; returns rows of a table. Rates are checkpoint bytes over time blocked, as in the paper."""
    rows = [("model", "GPUs", "iteration s", "blocked s: paper", "lazy", "copied in save()", "GB/s: paper", "lazy", "copied",
             "lazy / paper", "copied / paper", "node link GB/s at which lazy = paper")]  # fmt: skip
    for model in models:
        note(f"published setting: {model.name}")
        cluster = dataclasses.replace(POLARIS, nodes=model.gpus // POLARIS.gpus_per_node)
        rates, blocked = {}, {}
        for way, lazy in (("lazy", True), ("copied in save()", False)):
            outcome = simulate(cluster, model.job(lazy=lazy), saving_for(cluster))
            blocked[way] = statistics.mean(outcome.blocked())
            rates[way] = model.checkpoint_gb / blocked[way]
            detail = {"published_GBps": model.published_gb_per_s, "rate_GBps": rates[way], "gpus": model.gpus}
            name = f"published setting, {model.name} on {model.gpus} GPUs, {way}"
            add_line(report, name, outcome, int(model.checkpoint_gb * 1e9), sources=SOURCES, **detail)
        paper_s = model.checkpoint_gb / model.published_gb_per_s
        implied = implied_node_link(model, cluster, paper_s)
        rows.append((
            model.name, str(model.gpus), f"{model.iteration_s:.2f}", f"{paper_s:.2f}",
            *(f"{seconds:.3f}" for seconds in blocked.values()), f"{model.published_gb_per_s:.0f}",
            *(f"{rate:.0f}" for rate in rates.values()),
            *(f"{rate / model.published_gb_per_s:.2f}" for rate in rates.values()), f"{implied:.1f}",
        ))  # fmt: skip
    return rows


def implied_node_link(model: Model, cluster: Cluster, blocked_s: float) -> float:
    """The rate of a node towards the file system, GB/s, at which saves hold training up for so long on average."""
    low, high = 0.1e9, 100e9
    for _ in range(10):
        middle = math.sqrt(low * high)
        tried = dataclasses.replace(cluster, node_link=middle, simulated_nodes=1)
        if statistics.mean(simulate(tried, model.job(), saving_for(tried)).blocked()) > blocked_s:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high) / 1e9
