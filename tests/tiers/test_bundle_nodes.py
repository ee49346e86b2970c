"""Bundles that land on the disks of nodes: two ranks in one process, real drains. A node is a directory of each rank's own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from node_roots import that_cannot_be_changed, wait_for
from support import assert_same, options, patience
from test_ranks_apart import PATIENT, Threaded, Wire
from tier_places import end_drains_below

import ckpt
from ckpt.directory.publish_lock import publishing
from ckpt.drain import journal as journals
from ckpt.errors import CheckpointError, DeadlineError

FILES = ("model_states.pt", "rank_{rank}_optim_states.pt")
SECONDS = patience(60.0)

pytestmark = pytest.mark.usefixtures("native")


def content(rank: int, value: float) -> dict[str, Any]:
    return {"rank": rank, "weights": torch.full((50_000,), value)}


class Job:
    """Both ranks, as long as it is not closed. Rank 0 writes the model, too.

    Args:
        without: the rank that is given no tiers.
    """

    def __init__(self, base: Path, ranks: int = 2, without: int = -1, **how: Any) -> None:
        wire = Wire()
        self.home = base / "home"
        self.nodes = [base / f"node-{rank}" for rank in range(ranks)]
        self.ranks = [
            ckpt.BundleCheckpointer(
                options=options(**({"max_failed_saves": 0} | PATIENT | how)),
                coordinator=Threaded(wire, rank) if ranks > 1 else "local",
                tiers=[ckpt.Tier.node(self.nodes[rank], address="127.0.0.1")] if rank != without else [],
            )
            for rank in range(ranks)
        ]

    def all(self, act: Any) -> list[Any]:
        def run(rank: int) -> Any:
            try:
                return act(rank)
            except CheckpointError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(len(self.ranks)) as pool:
            return list(pool.map(run, range(len(self.ranks))))

    def save(
        self, name: str, value: float, *, root: Path | None = None, common: tuple[str, ...] = (), **how: Any
    ) -> list[ckpt.PendingSave]:
        """
        Args:
            common: files that both ranks write.
        """
        where = root or self.home

        def act(rank: int) -> Any:
            bundle = self.ranks[rank].begin(where, name, **how)
            for file in FILES[rank:]:
                bundle.save(content(rank, value), where / name / file.format(rank=rank))
            for file in common:
                state = content(7, value)
                bundle.save({"weights": state["weights"]} if file.endswith(".safetensors") else state, where / name / file)
            return bundle.commit()

        pending = self.all(act)
        assert all(isinstance(each, ckpt.PendingSave) for each in pending), pending
        return pending

    def save_home(self, name: str, value: float, **how: Any) -> None:
        assert [each.exception(SECONDS) for each in self.save(name, value, **how)] == [None] * len(self.ranks)

    def save_to_nodes(self, name: str, value: float, **how: Any) -> list[Path]:
        """Where it lands."""
        landed = [each.on_tier("node").result(SECONDS) for each in self.save(name, value, **how)]
        for rank, path in enumerate(landed):
            assert path.is_relative_to(self.nodes[rank]), path
        return landed

    def find(self, name: str | None = None) -> list[Any]:
        return self.all(lambda rank: self.ranks[rank].find(self.home, name))

    def read(self, name: str) -> list[list[Path]]:
        """Of each rank, from where the files are read that hold a bundle."""
        found: list[list[Path]] = []
        for checkpointer in self.ranks:
            found.append([])
            for file in (path for path in sorted((self.home / name).iterdir()) if path.suffix == ".pt"):

                def attempt(path: Path, at: list[Path] = found[-1]) -> Any:
                    state = ckpt.load(path)
                    at.append(path)
                    return state

                assert_same(torch.load(file), checkpointer.read(file, attempt))
        return found

    def assert_at_home(self, name: str, value: float, latest: str = "") -> None:
        for rank in range(len(self.ranks)):
            for file in FILES[rank:]:
                assert_same(content(rank, value), torch.load(self.home / name / file.format(rank=rank)))
        assert self.latest() == (latest or name)
        assert list(self.home.rglob(".tmp-*")) == []

    @property
    def run(self) -> str:
        return str(json.loads((self.home / ".run").read_text())["run"])

    def latest(self) -> str:
        return (self.home / "latest").read_text()

    def close(self) -> None:
        for checkpointer in self.ranks:
            with contextlib.suppress(CheckpointError):
                checkpointer.close()


class Jobs:
    """One after the other in one place."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._running: Job | None = None

    def start(self, **how: Any) -> Job:
        self.end()
        self._running = Job(self.base, **how)
        return self._running

    def end(self) -> None:
        """At once, as if it had been killed."""
        if self._running is not None:
            for checkpointer in self._running.ranks:
                checkpointer.options = ckpt.Options(drain_timeout_s=0.01)
            self._running.close()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    yield jobs
    jobs.end()
    end_drains_below(tmp_path)


@pytest.fixture
def nothing_comes(tmp_path: Path) -> Iterator[contextlib.ExitStack]:
    """Home, until this is closed."""
    (tmp_path / "home" / ".drain").mkdir(parents=True)
    with contextlib.ExitStack() as held:
        held.enter_context(publishing(tmp_path / "home", "test"))
        yield held


def begun(jobs: Jobs, **how: Any) -> Job:
    """A job whose saves land on nodes, because it has saved before."""
    job = jobs.start(**how)
    job.save_home("first", 1.0)
    return job


def test_saves_land_on_the_nodes_and_come_home_as_ever(jobs: Jobs) -> None:
    job = begun(jobs)
    job.assert_at_home("first", 1.0)
    assert not any(node.exists() for node in job.nodes), "nobody knows yet whether it is saved to again"
    landed = [job.save_to_nodes("a", 2.0), job.save_to_nodes("b", 3.0), job.save_to_nodes("a", 4.0)]
    assert len({path for paths in landed for path in paths}) == 6, "nothing is replaced on the nodes"
    job.save_home("best", 5.0, move_latest=False, common=("expert.pt", "expert.safetensors"))
    for checkpointer in job.ranks:
        checkpointer.wait(SECONDS)
    job.assert_at_home("a", 4.0)
    job.assert_at_home("b", 3.0, latest="a")
    job.assert_at_home("best", 5.0, latest="a")
    files = {file["name"]: file["rank"] for file in json.loads((job.home / "best" / "manifest.json").read_text())["files"]}
    assert files == {
        "expert.pt": 0,
        "expert.safetensors": 0,
        **{name.format(rank=0): 0 for name in FILES},
        FILES[1].format(rank=1): 1,
    }
    assert {path.name for path in (job.home / "best").iterdir()} == {*files, "manifest.json"}
    assert job.find("best") == ["best", "best"]
    for checkpointer in job.ranks:  # one of them by the name that it has on the node
        assert_same(
            {"weights": content(0, 5.0)["weights"]}, checkpointer.read(job.home / "best" / "expert.safetensors", ckpt.load)
        )


def test_a_directory_that_was_looked_into_is_one_that_stays(jobs: Jobs) -> None:
    job = jobs.start()
    assert job.find() == [None, None]
    job.save_to_nodes("a", 1.0)


def test_what_goes_elsewhere_goes_straight_home(jobs: Jobs) -> None:
    """Another directory, one that lies deeper, one whose name no manifest may give, one beside our own files."""
    job = begun(jobs)
    job.save_to_nodes("a", 2.0)
    elsewhere: dict[str, dict[str, Any]] = {"b": {"root": job.home.with_name("other")}, "c": {"by_nodes": False}}
    for name, how in (elsewhere | {"deep/er": {}, "back\\slash": {}, ".hidden": {}}).items():
        for each in job.save(name, 3.0, **how):
            assert each.on_tier("node").result(SECONDS) == each.result(SECONDS) == each.path
    outside = job.all(lambda rank: job.ranks[rank].begin(job.home, "d"))
    for rank, bundle in enumerate(outside):
        bundle.save(content(rank, 4.0), job.home / f"elsewhere-{rank}.pt")
    errors = [pending.exception(SECONDS) for pending in [bundle.commit() for bundle in outside]]
    assert all("by_nodes=False" in str(error) for error in errors), errors


def test_a_job_that_begins_anew_waits_for_what_is_on_the_nodes(jobs: Jobs, nothing_comes: contextlib.ExitStack) -> None:
    """And takes from there what it finds there. Who names a checkpoint waits for that alone."""
    job = begun(jobs)
    job.save_to_nodes("a", 2.0)
    job = jobs.start()
    assert job.latest() == "first" and job.find("first") == ["first", "first"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        finding = pool.submit(job.find)
        assert not concurrent.futures.wait([finding], 1.0).done, "it does not wait"
        nothing_comes.close()
        assert finding.result(SECONDS) == ["a", "a"]
    job.assert_at_home("a", 2.0)
    at_home = [[path.is_relative_to(job.home) for path in paths] for paths in job.read("a")]
    assert at_home == [[False, False, True], [True, True, False]], "each rank has on its node what it has written"
    job.save_to_nodes("b", 3.0)


def test_it_does_not_wait_for_ever(jobs: Jobs, nothing_comes: contextlib.ExitStack) -> None:
    begun(jobs).save_to_nodes("a", 2.0)
    errors = jobs.start(drain_timeout_s=1.0).find()
    assert all("'a' (commit 2), complete on the nodes" in str(error) for error in errors), errors
    nothing_comes.close()
    assert jobs.start().find() == ["a", "a"]


def test_home_cannot_be_written_to(jobs: Jobs) -> None:
    job = begun(jobs)
    job.save_home("a", 2.0)
    with that_cannot_be_changed(job.home / ".drain" / job.run):
        pending = job.save("b", 3.0)
        for each in pending:
            assert each.on_tier("node").exception(SECONDS) is None, "the nodes have it"
        job = jobs.start()
        errors = job.find()
        assert all("'b' (commit 3) is complete on the nodes, and cannot come home" in str(error) for error in errors), errors
        assert job.find("a") == ["a", "a"]
    assert jobs.start().find() == ["b", "b"]


def test_the_disk_of_a_node_is_lost(jobs: Jobs, nothing_comes: contextlib.ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    """What had come home is read there. What had not is lost, and that is said."""
    job = begun(jobs)
    job.save_to_nodes("a", 2.0)
    jobs.end()
    end_drains_below(jobs.base)
    shutil.rmtree(job.nodes[1])
    nothing_comes.close()
    job = jobs.start()
    assert job.find() == ["first", "first"]
    assert "'a' (commit 2) lies on the nodes only in part, and is left out" in caplog.text
    job.save_to_nodes("b", 3.0)
    for each in job.ranks:
        each.wait(SECONDS)
    shutil.rmtree(job.nodes[1])
    assert job.find() == ["b", "b"]
    assert all(path.is_relative_to(job.home) for path in job.read("b")[1])


def test_a_node_that_missed_the_verdict(jobs: Jobs, nothing_comes: contextlib.ExitStack) -> None:
    """It has its files, and receipts, but no manifest, as a kill may leave it."""
    _, landed = begun(jobs).save_to_nodes("a", 2.0)
    jobs.end()
    end_drains_below(jobs.base)
    (landed / "manifest.json").unlink()
    (landed.parent / "drain" / "000000000002.json").unlink(missing_ok=True)  # the drain has never seen it
    nothing_comes.close()
    job = jobs.start()
    assert job.find() == ["a", "a"]
    job.assert_at_home("a", 2.0)


def test_what_had_failed_before_is_tried_again(jobs: Jobs, nothing_comes: contextlib.ExitStack) -> None:
    """A node was silent, so that another one has given it up; and it could not read its files. Now all is well."""
    job = begun(jobs)
    job.save_to_nodes("a", 2.0)
    jobs.end()
    paths = [journals.path_of(node / job.run, 2) for node in job.nodes]
    wait_for(lambda: all(journals.read(path) is not None for path in paths))
    end_drains_below(jobs.base)
    for path, code, blocked in zip(paths, (errno.ETIMEDOUT, errno.EIO), (True, False), strict=True):
        journal = journals.read(path) or pytest.fail()
        journal.change(journals.FAILED, next=None, errno=code, text="as it was", blocked=blocked)
        os.utime(path, ns=(0, time.time_ns() - 10**9))
    nothing_comes.close()
    job = jobs.start()
    assert job.find() == ["a", "a"]
    job.assert_at_home("a", 2.0)


@pytest.mark.parametrize("where", ["node", "both"])
def test_a_file_is_damaged(jobs: Jobs, where: str) -> None:
    """One of a job of one rank, whose node has all: home has it, or else it is not good."""
    job = begun(jobs, ranks=1)
    (landed,) = job.save_to_nodes("a", 2.0)
    job.ranks[0].wait(SECONDS)
    flip(landed / "state.pt")
    assert job.find() == ["a"] and job.find("a") == ["a"]
    (read,) = job.read("a")
    assert [path.is_relative_to(job.home) for path in read] == [True, False]
    if where == "both":
        flip(job.home / "a" / FILES[0])
        assert job.find() == ["first"]


def flip(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found)


def lose_home(jobs: Jobs) -> Job:
    """That of a job which has ended, and whose nodes hold what it has saved last, "a"."""
    job = begun(jobs)
    job.save_to_nodes("a", 2.0)
    for each in job.ranks:
        each.wait(SECONDS)
    jobs.end()
    end_drains_below(jobs.base)
    shutil.rmtree(job.home)
    return job


def test_home_is_lost(jobs: Jobs) -> None:
    """Training must not begin anew without a word."""
    lose_home(jobs)
    job = jobs.start()
    assert all("remove" in str(error) and "'a'" in str(error) for error in job.find())
    for node in job.nodes:
        shutil.rmtree(node)
    assert job.find() == [None, None]


def test_home_is_lost_and_the_first_node_knows_nothing_of_it(jobs: Jobs) -> None:
    """It is a spare one."""
    shutil.rmtree(lose_home(jobs).nodes[0])
    job = jobs.start()
    assert all("names no run" in str(error) for error in job.find())
    for _ in range(2):
        errors = job.all(lambda rank: job.ranks[rank].begin(job.home, "b"))
        assert all("nothing was saved" in str(error) and "rank 1 found that" in str(error) for error in errors), errors
    assert not (job.home / ".run").exists() and not list(job.nodes[0].glob("*/step-*"))


def test_home_has_another_name_by_now(jobs: Jobs, nothing_comes: contextlib.ExitStack, tmp_path: Path) -> None:
    """What is on the nodes follows it; but not to a copy."""
    job = begun(jobs)
    job.save_to_nodes("a", 2.0)
    jobs.end()
    end_drains_below(jobs.base)
    nothing_comes.close()
    copied = tmp_path / "copied"
    shutil.copytree(job.home, copied)
    job = jobs.start()
    first, job.home = job.home, copied
    errors = job.find()
    assert all(f"it goes to '{first}'" in str(error) for error in errors), errors
    shutil.rmtree(copied)
    first.rename(copied)
    assert job.find() == ["a", "a"]
    job.assert_at_home("a", 2.0)
    job.save_to_nodes("b", 3.0)


def test_what_cannot_be_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        ckpt.BundleCheckpointer(node="here", tiers=[ckpt.Tier.node(tmp_path / "node-0")])
    with ckpt.BundleCheckpointer(coordinator="local") as plain, pytest.raises(ValueError, match="tiers="):
        plain.wait_on_node()
    job = jobs.start()
    errors = job.all(lambda rank: job.ranks[rank].begin(job.nodes[0] / "home", "a"))
    assert all("must not lie in" in str(error) for error in errors), errors
    job = jobs.start(without=1)
    errors = job.all(lambda rank: job.ranks[rank].begin(job.home, "a"))
    assert all("not given the same tiers=" in str(error) for error in errors), errors


def test_a_wait_for_the_nodes_says_what_came_nowhere(jobs: Jobs, native: Any, nothing_comes: contextlib.ExitStack) -> None:
    job = begun(jobs)
    job.save_to_nodes("a", 2.0)
    native.set_fault("pwritev", path_part="node-1", error=5, count=-1)
    job.save("b", 3.0)
    errors = job.all(lambda rank: job.ranks[rank].wait_on_node(SECONDS))
    assert all("rank 1" in str(error) or "node-1" in str(error) for error in errors), errors
    native.clear_faults()
    assert job.all(lambda rank: job.ranks[rank].wait_on_node(SECONDS)) == [None, None]
    with pytest.raises(DeadlineError):
        job.ranks[0].wait(0.1)
