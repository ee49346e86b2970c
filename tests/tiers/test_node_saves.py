"""Saves that land on the disks of nodes: real ranks, real drains, kills. A node is a directory that its ranks share."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_commit
import torch
from choice import mostly_slow
from drain_points import RUN_POINTS, SPREAD_POINTS
from node_roots import drain_once
from nursery import Child, Ended, Nursery, nurseries_of_ranks
from support import patience

from ckpt.metrics.events import read_events
from ckpt.tiers.drain_process import DrainProcess

MOST_RANKS = 4

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(MOST_RANKS, optimizer=True) as made:
        yield made


class Told(test_commit.Told):
    """What one rank said."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self.landed = {int(step): Path(path) for step, path in re.findall(r"^landed (\d+) (.*)$", ended.stdout, re.MULTILINE)}


class Job:
    """A job on several nodes.

    Args:
        nodes: for each rank, the number of its node.
    """

    def __init__(self, nurseries: list[Nursery], path: Path, nodes: list[int]) -> None:
        self.home = path / "home"
        self.nodes = [path / f"node-{number}" for number in nodes]
        self._nurseries = nurseries

    def start(self, *each: dict[str, Any], **common: Any) -> list[Child]:
        children = []
        for rank, node in enumerate(self.nodes):
            request = {"directory": str(self.home), "rank": rank, "world": len(self.nodes), "node": str(node)}
            request |= common | (each[rank] if each else {})
            children.append(self._nurseries[rank].start(f"from dist import commit_worker; commit_worker.main({request!r})"))
        return children

    def run(self, *each: dict[str, Any], **common: Any) -> list[Told]:
        told = [Told(child.wait()) for child in self.start(*each, **common)]
        for rank in told:
            assert rank.ended.returncode == 0, rank.ended.stderr
        return told


Make = Callable[..., Job]


@pytest.fixture
def make(nurseries: list[Nursery], tmp_path: Path) -> Iterator[Make]:
    yield lambda *nodes: Job(nurseries, tmp_path, list(nodes))
    end_drains(tmp_path)


def end_drains(directory: Path, tiers: str = "node-*") -> None:
    """Those that outlive their job, because home is far behind.

    Args:
        tiers: which directories in this one are those of nodes.
    """
    for lock in directory.glob(f"{tiers}/*/.drain.lock"):
        drain = DrainProcess(lock.parent)
        while drain.runs():  # who it is the lock may not say: its disk is full
            for process in psutil.process_iter(["cmdline"]):
                if str(lock.parent) in (process.info["cmdline"] or ()):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            time.sleep(0.01)


def assert_at_home(job: Job, step: int) -> None:
    folder = job.home / f"step-{step:012d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    kinds = [(file["kind"], file["rank"]) for file in manifest["files"]]
    assert sorted(kinds) == sorted([("replicated", 0), *(("rank", rank) for rank in range(len(job.nodes)))])
    for file in manifest["files"]:
        state = torch.load(folder / file["name"])
        if file["kind"] == "rank":
            assert (state["rank"], state["step"]) == (file["rank"], step)


@pytest.mark.parametrize("nodes", [[0, 1], [0, 0], [0, 1, 0, 1]], ids=str)
def test_saves_land_on_the_nodes_and_come_home(make: Make, nodes: list[int]) -> None:
    job = make(*nodes)
    told = job.run()
    for rank, each in enumerate(told):
        assert [*each.landed] == [0, 1, 2] and each.durable[-1] == 2 and not each.failed, each.ended
        assert all(path.is_relative_to(job.nodes[rank]) for path in each.landed.values())
    assert_at_home(job, 2)
    manifests = {(path / "manifest.json").read_bytes() for path in (each.landed[2] for each in told)}
    assert len(manifests) == 1, "all nodes have the same"
    told_of(job.home, [*range(3)])


def told_of(home: Path, steps: list[int]) -> None:
    """Rank 0 has told of each when it was on the nodes, and of each that has come home."""
    events = [event for event in read_events(home) if event["rank"] == 0]
    assert [event["step"] for event in events if (event["event"], event.get("tier")) == ("commit", "node")] == steps
    saves = {event["step"]: event for event in events if event["event"] == "save"}
    drained = {event["step"]: event for event in events if event["event"] == "drain"}
    assert [*saves] == [*drained] == steps and saves[steps[-1]]["outcome"] == "committed"
    for step, save in saves.items():
        assert (drained[step]["outcome"] == "committed") == (save["outcome"] == "committed")
        assert drained[step]["tier"] == "home" and save["tiers_s"]["node"] > 0
        if save["outcome"] == "committed":
            assert save["tiers_s"]["node"] < save["durable_s"] and drained[step]["began"] <= drained[step]["ended"]
            assert drained[step]["bytes"] > 0


SLOW_HOME = {"tier": {"rate": 50_000}, "wait": False, "options": {"drain_timeout_s": 0.2}}
IMPATIENT: dict[str, Any] = {
    "options": {"commit_timeout_s": patience(3.0), "timeout_s": patience(8.0)},
    "patience": 1,
    "wait": False,
}
ALL_RANKS = ["before-rename", "renamed", "receipt-written", "receipt-renamed", "prepared"]
LEADERS = ["manifest-written", "manifest-renamed", "tidied"]


def assert_resumes(job: Job, least: int, **common: Any) -> list[Told]:
    """The next run finds what was promised, or something newer, the same on all ranks; and it comes home."""
    told = job.run(steps=1, **common)
    found = {each.found for each in told}
    step = next(iter(found))[0] if len(found) == 1 else None
    assert step is not None and step >= least, found
    assert step < 0 or found == {(step, test_commit.expected_digest(step), step)}
    return told


POINTS = [(point, rank) for rank in (0, 1) for point in (*ALL_RANKS, *LEADERS)]
POINTS += [(point, 0) for point in ("published", *RUN_POINTS)] + [(point, 1) for point in SPREAD_POINTS]
FEW = [("manifest-renamed", 1), ("spread", 1)]


@pytest.mark.parametrize(("point", "rank"), mostly_slow(POINTS, run=FEW))
def test_a_rank_is_killed(make: Make, point: str, rank: int) -> None:
    """What had landed is found again, with what the drains have brought home meanwhile."""
    job = make(0, 1)
    killed = {"crash_point": point, "crash_skip": 0 if point in RUN_POINTS else 1}
    told = [Told(child.wait()) for child in job.start(*[killed if each == rank else {} for each in (0, 1)], **IMPATIENT)]
    assert told[rank].ended.returncode == -9, told[rank].ended
    assert_resumes(job, max(max(each.landed, default=-1) for each in told))
    assert_at_home(job, max(int(path.name[5:]) for path in job.home.glob("step-*")))


def test_a_node_fails_while_a_step_is_replaced(make: Make) -> None:
    """Node 0 has the new manifest and the old files no more, node 1 the old manifest and both: the new one is found."""
    job = make(0, 1)
    fault = {"call": "rename", "path_part": "manifest.json", "error": errno.EIO, "skip": 1}
    told = job.run({}, {"plan": {"1": {"fault": fault, "twice": True}}}, steps=2, plan={"1": {"twice": True}}, **SLOW_HOME)
    for each in told:
        assert [*each.landed] == [0] and each.failed[1][0] in ("StorageError", "PeerError"), each.ended.stdout
    assert_resumes(job, 1, **SLOW_HOME)
    (one,), (other,) = (node.glob("*/step-000000000001/manifest.json") for node in job.nodes)
    assert one.read_bytes() == other.read_bytes()


def test_a_job_that_is_killed_goes_on_from_the_nodes(make: Make) -> None:
    """Home is far behind."""
    job = make(0, 1)
    told = job.run(**SLOW_HOME)
    assert all([*each.landed] == [0, 1, 2] for each in told)
    assert not (job.home / "step-000000000002").exists()
    assert_resumes(job, 2, **SLOW_HOME)


def test_a_job_goes_back_to_a_step_that_lies_on_the_nodes(make: Make) -> None:
    """What it saves from there is the newest, on the nodes and at home, and what it went back to stays at home."""
    job = make(0, 1)
    job.run(steps=4)
    told = job.run(steps=1, at=2, keep=1)
    assert {each.found for each in told} == {(2, test_commit.expected_digest(2), 2)}
    assert all(each.durable == [3] and [*each.landed] == [3] for each in told)
    assert (job.home / "latest").read_text().strip() == "step-000000000003"
    assert test_commit.committed(job.home) == [2, 3]
    assert_resumes(job, 3)


def test_a_job_of_other_ranks_lets_come_home_what_lies_there(make: Make) -> None:
    """It has cleaned the disk and described the node as its own, and got no further."""
    job, other = make(0, 1), make(0)
    job.run(**SLOW_HOME)
    (told,) = other.run(plan={"0": {"unpicklable": True}}, steps=1, **SLOW_HOME)
    (root,) = job.nodes[0].iterdir()
    assert told.failed and json.loads((root / "node.json").read_text())["nodes"] == 1
    end_drains(job.home.parent)
    for node in job.nodes:
        shutil.rmtree(node / root.name / "drain")  # as if no drain had come to note anything
    for node in (*job.nodes, job.nodes[0]):
        drain_once(node / root.name, "--rate=1GiB/s")
    assert_at_home(job, 2)


def test_the_disk_of_a_node_is_lost(make: Make) -> None:
    """Its ranks read from home what the others read from their nodes; what only the nodes had is lost with it."""
    job = make(0, 1)
    job.run()
    shutil.rmtree(job.nodes[1])
    assert_resumes(job, 2)


def test_home_is_lost_and_one_node_knows(make: Make) -> None:
    """All ranks are told, by rank 0, which knows of nothing itself."""
    job = make(0, 1)
    job.run(steps=1)
    end_drains(job.home.parent)
    shutil.rmtree(job.home)
    shutil.rmtree(job.nodes[0])
    (root,) = job.nodes[1].iterdir()
    for told in (Told(child.wait()) for child in job.start()):
        assert told.ended.returncode != 0 and told.found is None
        assert "NotACheckpointError" in told.ended.stderr and f"remove '{root}' on each node" in told.ended.stderr


def test_a_node_is_full(make: Make) -> None:
    """Saves go straight home, until there is room again."""
    job = make(0, 1)
    told = job.run(steps=6, tier={"max_bytes": 4_000_000, "keep": 1})
    for each in told:
        assert not each.failed and [*each.landed] == [*range(6)]
        assert any(path.is_relative_to(job.home) for path in each.landed.values()), "it is too small for three"
    assert_at_home(job, 5)
    assert_resumes(job, 5)


def test_a_disk_of_a_node_fails(make: Make) -> None:
    """The save that meets it fails; the next one that begins behind it goes home; then the disk is tried again."""
    job = make(0, 1)
    fault = {"call": "pwritev", "path_part": "node-1", "error": errno.EIO, "count": -1}
    told = job.run({}, {"plan": {"1": {"fault": fault}}}, steps=6)
    for rank, each in enumerate(told):
        assert [*each.failed] == [1], each.ended
        where = {step: path.is_relative_to(job.nodes[rank]) for step, path in each.landed.items()}
        assert where == {0: True, 2: True, 3: True, 4: False, 5: True}
    assert_at_home(job, 5)
