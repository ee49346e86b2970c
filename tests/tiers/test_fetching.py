"""Restores that take from other nodes what their own lacks: real ranks, real drains. A node is a directory."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from choice import mostly_slow
from node_roots import DEADLINE_S
from nursery import Ended, Nursery, sharding_nurseries

from ckpt.directory.publish_lock import publishing

RANKS = 2  # of most jobs
MOST_RANKS = 3
# So slow that nothing comes home but the first file of a node; and the other nodes are reached without a network.
BOTH = [(False, "each"), (True, "all")]
PAIRS = [(False, "each", 0), (False, "all", 1), (True, "each", 1), (True, "all", 0)]  # any two values meet
NODES_ALONE = {"rate": 1, "address": "127.0.0.1"}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(MOST_RANKS) as nurseries:
        yield nurseries


class Job:
    """Of two ranks, each with a node of its own."""

    def __init__(self, nurseries: list[Nursery], path: Path) -> None:
        self.home = path / "home"
        self.path = path
        self._nurseries = nurseries
        self._meetings = 0

    def run(self, work: str, nodes: tuple[int, ...] = (0, 1), **request: Any) -> list[dict[str, Any]]:
        """What each rank says. While they restore nothing comes home, and of the first save only with `home`.

        Args:
            nodes: for each rank, on which it is.
        """
        self._meetings += 1
        common = {"work": work, "directory": str(self.home), "world": len(nodes), "tier": NODES_ALONE}
        common |= {"meeting": str(self.path / f"meeting-{self._meetings}")}
        (self.home / ".drain").mkdir(parents=True, exist_ok=True)
        held = work == "restore" or (self._meetings == 1 and not request.get("home"))
        with publishing(self.home, "test") if held else contextlib.nullcontext():
            ended = self._run(nodes, common, request)
        self.errors = [each.stderr for each in ended]
        for each in ended:
            assert each.returncode == 0, each.stderr
        return [json.loads(each.stdout) for each in ended]

    def _run(self, nodes: tuple[int, ...], common: dict[str, Any], request: dict[str, Any]) -> list[Ended]:
        children = []
        for rank, node in enumerate(nodes):
            wishes = common | {"rank": rank, "node": str(self.path / f"node-{node}")} | request
            program = f"from dist import fetching_worker; fetching_worker.main({wishes!r})"
            children.append(self._nurseries[rank].start(program))
        return [child.wait() for child in children]

    def step(self, node: int, step: int = 1) -> Path:
        (found,) = (self.path / f"node-{node}").glob(f"*/step-{step:012d}")
        return found

    def lose(self, node: int) -> None:
        """Its disk; its drain goes with it."""
        self.end_drains(node)
        shutil.rmtree(self.path / f"node-{node}")

    def end_drains(self, node: int | None = None) -> None:
        """Also those that are just being started: all whose command names a node of this job."""
        base = str(self.path / ("node-" if node is None else f"node-{node}/"))

        def running() -> list[psutil.Process]:
            named = psutil.process_iter(["cmdline"])
            return [each for each in named if any(part.startswith(base) for part in each.info["cmdline"] or ())]

        while found := running():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
            psutil.wait_procs(found, DEADLINE_S)

    def assert_tidy(self) -> None:
        """What was fetched stays only as long as it is needed."""
        assert [*self.path.glob("node-*/*/fetched-*")] == []


@pytest.fixture
def job(nurseries: list[Nursery], tmp_path: Path) -> Iterator[Job]:
    made = Job(nurseries, tmp_path)
    try:
        yield made
    finally:
        made.end_drains()


def damage(path: Path, rank: int = 0) -> None:
    """In the midst of a tensor, and of what a rank reads of it if each reads a part."""
    content = bytearray(path.read_bytes())
    content[len(content) * (2 * rank + 1) // (2 * RANKS)] ^= 1
    path.write_bytes(content)


def name_of(folder: Path, part: str) -> str:
    return next(path.name for path in folder.iterdir() if part in path.name)


ALL = ["own", "replicated", "sharded"]


def test_a_sharded_state_comes_from_the_nodes_alone(job: Job) -> None:
    """Its metadata lies on one of them, and each rank needs a little of what the other has written."""
    saved = job.run("save", kinds=ALL)
    found = job.run("restore", kinds=ALL)
    assert [each["step"] for each in found] == [1, 1]
    assert {each["digest"] for each in (*saved, *found)} == {saved[0]["digest"]}
    assert found[0]["sources"][".metadata"] == "node" and found[1]["sources"][".metadata"] == "node 0"
    for rank, each in enumerate(found):
        sources = each["sources"]
        assert sources[f"rank-{rank:05d}.pt"] == sources["replicated.pt"] == sources[f"__{rank}_0.distcp"] == "node"
    job.assert_tidy()


def test_ranks_are_on_other_nodes_than_before(job: Job) -> None:
    saved = job.run("save", kinds=ALL)
    job.end_drains()  # and are started again by the restore
    found = job.run("restore", kinds=ALL, nodes=(1, 0))
    assert {each["digest"] for each in (*saved, *found)} == {saved[0]["digest"]}
    assert found[0]["sources"]["rank-00000.pt"] == "node 0" and found[1]["sources"]["rank-00001.pt"] == "node 1"
    job.assert_tidy()


@pytest.mark.parametrize(
    ("into", "readers"), mostly_slow(product((False, True), ("each", "all")), [(False, "each"), (True, "all")])
)
def test_the_disk_of_a_node_is_lost(job: Job, into: bool, readers: str) -> None:
    """What was the same on all lies on the other one."""
    job.run("save", kinds=["replicated"], steps=[1, 2])
    assert not [*job.home.glob("step-*")]
    job.lose(1)
    found = job.run("restore", kinds=["replicated"], into=into, options={"replicated_readers": readers})
    assert [each["step"] for each in found] == [2, 2]
    assert [each["sources"] for each in found] == [{"replicated.pt": "node"}, {"replicated.pt": "node 0"}]
    job.assert_tidy()


@pytest.mark.parametrize(("into", "readers", "node"), mostly_slow(product((False, True), ("each", "all"), (0, 1)), PAIRS))
def test_a_damaged_file_comes_from_another_node(job: Job, into: bool, readers: str, node: int) -> None:
    """Not an older checkpoint, and not all files."""
    job.run("save", kinds=["own", "replicated"], steps=[1, 2])
    damage(job.step(node, 2) / "replicated.pt", rank=node)
    found = job.run("restore", kinds=["own", "replicated"], into=into, options={"replicated_readers": readers})
    assert [each["step"] for each in found] == [2, 2]
    for rank, each in enumerate(found):
        assert each["sources"]["replicated.pt"] == (f"node {1 - node}" if rank == node else "node")
        assert each["sources"][f"rank-{rank:05d}.pt"] == "node"


def test_a_damaged_file_comes_from_home(job: Job) -> None:
    """No other node has it. The rest is read from the nodes all the same."""
    saved = job.run("save", kinds=ALL, home=True, tier={"address": "127.0.0.1"})
    names = ["rank-00001.pt", "__1_0.distcp"]
    for name in names:
        damage(job.step(1) / name)
    found = job.run("restore", kinds=ALL)
    assert {each["digest"] for each in (*saved, *found)} == {saved[0]["digest"]}
    assert [found[1]["sources"][name] for name in names] == ["home", "home"]
    assert found[1]["sources"]["replicated.pt"] == "node" and found[0]["sources"]["rank-00000.pt"] == "node"


def test_what_no_place_has_is_passed_over(job: Job) -> None:
    job.run("save", kinds=["own", "replicated"], steps=[1, 2])
    damage(job.step(1, 2) / "rank-00001.pt")
    found = job.run("restore", kinds=["own", "replicated"])
    assert [each["step"] for each in found] == [1, 1]
    assert "step-000000000002' as it lies on the nodes is passed over" in job.errors[0]


def test_with_another_number_of_ranks_home_alone_counts(job: Job) -> None:
    job.run("save", kinds=["own", "replicated"], steps=[1], home=True, tier={"address": "127.0.0.1"})
    job.end_drains()
    job.run("save", kinds=["own", "replicated"], steps=[2])
    (found,) = job.run("restore", (0,), kinds=["own", "replicated"], merge=True)
    assert found["step"] == 1 and {*found["sources"].values()} == {"home"}


def test_a_restore_needs_no_drain_that_runs(job: Job) -> None:
    """A node that serves nothing costs what only it has, and nothing else."""
    job.run("save", kinds=["own", "replicated"], steps=[1, 2])
    job.end_drains()
    described = job.step(1).parent / "node.json"
    described.unlink()
    found = job.run("restore", kinds=["own", "replicated"])
    assert [each["step"] for each in found] == [2, 2]
    assert {source for each in found for source in each["sources"].values()} == {"node"}


def test_a_node_has_missed_the_verdict(job: Job) -> None:
    """Its files and receipts are there: they count, and it gets the manifest from the other one."""
    job.run("save", kinds=ALL, steps=[1, 2])
    job.end_drains()
    manifest = job.step(1, 2) / "manifest.json"
    manifest.unlink()
    found = job.run("restore", kinds=ALL)
    assert [each["step"] for each in found] == [2, 2]
    assert found[1]["sources"]["rank-00001.pt"] == found[1]["sources"]["replicated.pt"] == "node"
    assert manifest.read_bytes() == (job.step(0, 2) / "manifest.json").read_bytes()


def test_a_node_has_missed_the_verdict_and_has_other_files(job: Job) -> None:
    """As of a save that was given up: they do not pass for what the manifest names."""
    job.run("save", kinds=["own", "replicated"], steps=[1, 2])
    job.end_drains()
    for name in ("rank-00001.pt", "receipt-00001.json"):
        shutil.copy(job.step(1, 1) / name, job.step(1, 2) / name)
    manifest = job.step(1, 2) / "manifest.json"
    manifest.unlink()
    found = job.run("restore", kinds=["own", "replicated"])
    assert [each["step"] for each in found] == [1, 1]
    assert not manifest.exists()


def test_ranks_of_one_node_share_what_is_fetched(job: Job) -> None:
    """It comes once."""
    job.run("save", (0, 1, 1), kinds=["replicated"])
    job.lose(1)
    found = job.run("restore", (0, 1, 1), kinds=["replicated"])
    assert [each["step"] for each in found] == [1, 1, 1]
    assert sorted(each["sources"]["replicated.pt"] for each in found) == ["another node", "node", "node 0"]
    assert sum(errors.count("was fetched from node 0") for errors in job.errors) == 1
    job.assert_tidy()
