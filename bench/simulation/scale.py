"""Onwards to thousands of GPUs: how often one can save before it costs training time, and which level is the limit then.

Two questions are put to the simulation. For each level alone, with all others made free: what is the shortest interval
between saves at which it holds training up by less than 1 %? And with all levels as they are: how much time is lost?
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.measure.report import Report
from bench.measure.sampling import note
from bench.simulation.model import INFINITE, Cluster, Job, Outcome, Saving
from bench.simulation.published import ARENA_PER_NODE, NODE_DISK, POLARIS, PUBLISHED, add_line, flat, saving_for
from bench.simulation.rank import simulate

BIGGEST = PUBLISHED[-1]
CHECKPOINT = int(BIGGEST.checkpoint_gb * 1e9)
BYTES_PER_GPU = CHECKPOINT // BIGGEST.gpus  # 13.3 GB: what a GPU held in the paper's largest case
GROWS, SHARED = "model grows, 13.3 GB a GPU", "70B, shared by all"
SIZES = (80, 1024, 16384)
PAPERS = "650 GB/s"
FILE_SYSTEMS = {PAPERS: 650e9, "10 TB/s": 10e12}  # the paper's, and a larger one
INTERVALS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
ARENAS_GB = (0.5, 2.0, 4.0, 8.0, 16.0)  # of a GPU
ARENA_INTERVAL_S = 1000.0
SAVES = 16
CHUNKS, NODES = 32, 2  # the grain of this study, and how many nodes stand for all
FREE = 0.01  # of the training's time: less does not matter
SHORTEST_S, LONGEST_S = 1e-3, 1e4
PRECISION = 1.05

SAVE_CALL, ALL = "save() itself", "all together"
FLAT_COMMIT = "commit, flat"  # in place of by node: to compare with
LEVELS = (SAVE_CALL, "D2H link", "node disk", "node link", "file system", "commit")
TIER = ", by way of the nodes"


class Case(NamedTuple):
    """A cluster, and what is saved on it.

    Attributes:
        by_node: whether saves land on the disks of the nodes, and are carried to the file system from there.
    """

    gpus: int
    growth: str
    file_system: str
    by_node: bool = False

    @property
    def way(self) -> str:
        return self.file_system + (TIER if self.by_node else "")

    @property
    def bytes_per_rank(self) -> int:
        return BYTES_PER_GPU if self.growth == GROWS else CHECKPOINT // self.gpus

    def cluster(self) -> Cluster:
        rate = FILE_SYSTEMS[self.file_system]
        servers = round(POLARIS.servers * rate / POLARIS.file_system)
        nodes = self.gpus // POLARIS.gpus_per_node
        disk = NODE_DISK if self.by_node else None
        return dataclasses.replace(
            POLARIS, nodes=nodes, simulated_nodes=NODES, file_system=rate, servers=servers, node_disk=disk
        )

    def saving(self) -> Saving:
        return dataclasses.replace(saving_for(self.cluster()), most_chunks=CHUNKS)


class Study(NamedTuple):
    """What was found for a case.

    Attributes:
        critical_s: for each level alone, for the commit if it were flat, and for all together: the shortest interval that costs
            less than FREE.
        lost: for each interval in seconds, the share of the training's time.
        by_arena: for each size of the arena in GB, the same at ARENA_INTERVAL_S.
        age_at_home: with a tier of nodes, for each interval, how old the newest checkpoint at home gets, seconds (median).
    """

    case: Case
    critical_s: dict[str, float]
    lost: dict[float, float]
    by_arena: dict[float, float]
    age_at_home: dict[float, float]

    def limit_at(self, interval_s: float) -> str:
        """The level that would need the longest interval, if that is longer than this one; else "-"."""
        slowest = max(LEVELS, key=lambda level: self.critical_s[level])
        return slowest if self.lost[interval_s] > FREE else "-"


def cases(sizes: Sequence[int]) -> list[Case]:
    found = [Case(gpus, growth, name) for growth in (GROWS, SHARED) for gpus in sizes for name in FILE_SYSTEMS]
    found += [Case(gpus, growth, PAPERS, by_node=True) for growth in (GROWS, SHARED) for gpus in sizes]
    return [case for case in found if case.gpus > BIGGEST.gpus or (case.growth == GROWS and case.file_system == PAPERS)]


def alone(level: str, cluster: Cluster, saving: Saving) -> tuple[Cluster, Saving]:
    """All other levels made free. A tier of nodes stays one: what it spares the training is the file system."""
    rates = {"d2h": "D2H link", "node_link": "node link", "file_system": "file system"}
    costs = {"plan_s": SAVE_CALL, "fsync_s": "commit", "publish_s": "commit"}
    costs |= dict.fromkeys(("gather_s", "verdict_s", "node_s", "decide_s"), "commit")
    free_rates: dict[str, Any] = {name: INFINITE for name, owner in rates.items() if owner != level}
    free_costs: dict[str, Any] = {name: 0.0 for name, owner in costs.items() if owner != level}
    if cluster.node_disk is not None and level != "node disk":
        free_rates["node_disk"] = INFINITE
    return dataclasses.replace(cluster, **free_rates), dataclasses.replace(saving, **free_costs)


def job_for(case: Case, interval_s: float, saves: int = SAVES) -> tuple[Job, float]:
    """A training that saves about so often, and how often exactly: no iteration is longer than the paper's."""
    every = max(1, round(interval_s / BIGGEST.iteration_s))
    iteration_s = min(interval_s / every, BIGGEST.iteration_s)
    part = iteration_s / BIGGEST.iteration_s
    times = {"forward_s": BIGGEST.forward_s, "backward_s": BIGGEST.backward_s, "update_s": BIGGEST.update_s}
    scaled = {name: seconds * part for name, seconds in times.items()}
    return Job(case.bytes_per_rank, **scaled, iterations=every * saves, every=every), every * iteration_s


def steady_loss(outcome: Outcome, interval_s: float) -> float:
    """Of the training's time, once what was empty at the beginning is full: over the second half of the saves."""
    blocked = outcome.blocked()
    return statistics.mean(blocked[len(blocked) // 2 :]) / interval_s


def loss(case: Case, cluster: Cluster, saving: Saving, interval_s: float) -> float:
    job, exactly_s = job_for(case, interval_s)
    return steady_loss(simulate(cluster, job, saving), exactly_s)


def critical_interval(case: Case, cluster: Cluster, saving: Saving) -> float:
    """By halving; SHORTEST_S where even that costs nothing."""
    low, high = SHORTEST_S, LONGEST_S
    if loss(case, cluster, saving, low) <= FREE:
        return low
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        if loss(case, cluster, saving, middle) > FREE:
            low = middle
        else:
            high = middle
    return high


def study(report: Report, case: Case) -> Study:
    """Adds a line for each interval and each arena."""
    cluster, saving = case.cluster(), case.saving()
    name = f"{case.growth}: {case.gpus} GPUs, file system {case.way}"
    note(name)
    critical_s = {level: critical_interval(case, *alone(level, cluster, saving)) for level in LEVELS}
    critical_s[FLAT_COMMIT] = critical_interval(case, *alone("commit", cluster, flat(saving, cluster)))
    critical_s[ALL] = critical_interval(case, cluster, saving)
    lost, by_arena, age_at_home = {}, {}, {}
    parameters = {"cluster": dataclasses.asdict(cluster), "saving": dataclasses.asdict(saving)}
    detail = {"gpus": case.gpus, "critical_interval_s": critical_s, "parameters": parameters}
    for interval_s in INTERVALS_S:
        job, exactly_s = job_for(case, interval_s)
        outcome = simulate(cluster, job, saving)
        lost[interval_s] = steady_loss(outcome, exactly_s)
        more = {"interval_s": exactly_s, "steady_loss": lost[interval_s]} | detail
        if ages := outcome.ages_at_home():
            more["age_at_home_s"] = age_at_home[interval_s] = statistics.median(ages)
            more["saves_at_home"] = len(outcome.home_at)
        add_line(report, f"{name}, every {interval_s:g} s", outcome, job.bytes_per_rank * case.gpus, **more)
    for arena_gb in ARENAS_GB:
        job, exactly_s = job_for(case, ARENA_INTERVAL_S)
        outcome = simulate(cluster, job, dataclasses.replace(saving, arena_bytes=int(arena_gb * 1e9)))
        by_arena[arena_gb] = steady_loss(outcome, exactly_s)
        more = {"interval_s": exactly_s, "steady_loss": by_arena[arena_gb], "arena_gb": arena_gb} | detail
        add_line(report, f"{name}, arena {arena_gb:g} GB", outcome, job.bytes_per_rank * case.gpus, **more)
    return Study(case, critical_s, lost, by_arena, age_at_home)


# ---- for the reader --------------------------------------------------------------------------------------------------


def critical_rows(studies: Sequence[Study]) -> list[tuple[str, ...]]:
    """The shortest interval that costs less than 1 %."""
    rows = [("checkpoint", "GPUs", "file system", *(f"{level}, s" for level in (*LEVELS, FLAT_COMMIT, ALL)), "limit")]
    for found in studies:
        cells = (f"{found.critical_s[level]:.3g}" for level in (*LEVELS, FLAT_COMMIT, ALL))
        limit = max(LEVELS, key=lambda level: found.critical_s[level])
        rows.append((found.case.growth, f"{found.case.gpus:,}", found.case.way, *cells, limit))
    return rows


def arena_rows(studies: Sequence[Study]) -> list[tuple[str, ...]]:
    """Time lost with smaller arenas, at a long interval."""
    rows = [("checkpoint", "GPUs", "file system", *(f"{gb:g} GB" for gb in ARENAS_GB))]
    for found in studies:
        cells = (f"{lost:.1%}" for lost in found.by_arena.values())
        rows.append((found.case.growth, f"{found.case.gpus:,}", found.case.way, *cells))
    return rows


def age_rows(studies: Sequence[Study]) -> list[tuple[str, ...]]:
    """With a tier of nodes: how old what all nodes lost would fall back to."""
    shown = [found for found in studies if found.age_at_home]
    if not shown:
        return []
    intervals = [interval_s for interval_s in INTERVALS_S if all(interval_s in found.age_at_home for found in shown)]
    rows = [("checkpoint", "GPUs", "file system", *(f"every {interval_s:g} s" for interval_s in intervals))]
    for found in shown:
        cells = (f"{found.age_at_home[interval_s]:.3g}" for interval_s in intervals)
        rows.append((found.case.growth, f"{found.case.gpus:,}", found.case.way, *cells))
    return rows


ARENA_GB = ARENA_PER_NODE / POLARIS.gpus_per_node / 1e9
EXPLANATION = (
    f"The shortest interval between saves that costs less than {FREE:.0%} of the training: for each level alone, then for all "
    f"together, with an arena of {ARENA_GB:g} GB a GPU"
)
AGE_EXPLANATION = (
    "By way of the nodes: seconds by which the newest checkpoint at home is older than the training when the next one arrives "
    "there (median), which is what a loss of all nodes costs; a loss of processes costs one interval"
)
ARENA_EXPLANATION = f"Training time lost with a save every {ARENA_INTERVAL_S:g} s, by the arena of a GPU"
