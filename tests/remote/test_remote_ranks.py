"""Jobs of several ranks with an object store behind home: real ranks, and homes and nodes that are lost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_commit
from nursery import Child, Ended, Nursery
from object_server import Fault, ObjectServer, Proxy, options_for
from remote_jobs import end_drains

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    nurseries = [Nursery(optimizer=True) for _ in range(2)]
    yield nurseries
    for nursery in nurseries:
        nursery.__exit__()


class Told(test_commit.Told):
    """What one rank said."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self.carried = {int(step): url for step, url in re.findall(r"^carried (\d+) (.*)$", ended.stdout, re.MULTILINE)}


class Job:
    """Of two ranks.

    Args:
        nodes: whether each has a node of its own.
    """

    def __init__(
        self, nurseries: list[Nursery], base: Path, server: ObjectServer | Proxy, bucket: str, nodes: bool, **remote: Any
    ) -> None:
        self.base = base
        self.nodes = [base / f"node-{rank}" if nodes else None for rank in range(2)]
        self._nurseries = nurseries
        self._remote = {"url": f"s3://{bucket}/run1", "options": options_for(server.port), **remote}

    def run(self, home: str = "home", ranks: int = 2, **more: Any) -> list[Told]:
        children: list[Child] = []
        for rank in range(ranks):
            node = self.nodes[rank]
            request = {"directory": str(self.base / home), "rank": rank, "world": ranks, "remote": self._remote, "keep": 1}
            request |= {"node": None if node is None else str(node), **more}
            program = f"from dist import commit_worker; commit_worker.main({request!r})"
            children.append(self._nurseries[rank].start(program))
        told = [Told(child.wait()) for child in children]
        for rank in told:
            assert rank.ended.returncode == 0, rank.ended.stderr
        return told


@pytest.mark.parametrize("nodes", [False, True], ids=["home", "nodes"])
def test_what_is_lost_comes_from_the_store(
    nurseries: list[Nursery], tmp_path: Path, server: ObjectServer, bucket: str, nodes: bool
) -> None:
    """Home, and with nodes one of them, too: what the other has is read there. Then by another number of ranks."""
    job = Job(nurseries, tmp_path, server, bucket, nodes)
    try:
        told = job.run(steps=2)
        assert told[0].carried == told[1].carried and [*told[0].carried] == [0, 1]
        end_drains(tmp_path)
        shutil.rmtree(tmp_path / "home")
        if nodes:
            shutil.rmtree(tmp_path / "node-1")
        told = job.run("new", steps=1)
        assert {each.found for each in told} == {(1, test_commit.expected_digest(1), 1)}
        assert [*told[0].carried] == [*told[1].carried] == [2]
        end_drains(tmp_path)
        (alone,) = job.run("third", ranks=1, steps=1)
        assert alone.found == (2, test_commit.expected_digest(2), 2)
    finally:
        end_drains(tmp_path)


def test_a_refusal_of_rank_0_reaches_all_ranks(nurseries: list[Nursery], tmp_path: Path, proxy: Proxy, bucket: str) -> None:
    """None of them is left waiting: at the first save, when home does not take what the drain is told; and at a later one."""
    job = Job(nurseries, tmp_path, proxy, bucket, nodes=True, required=True)
    in_the_way = tmp_path / "home" / ".remote"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    try:
        told = job.run(steps=1)
        assert told[0].failed[0][0] == "StorageError" and told[1].failed[0] == (
            "PeerError",
            f"rank 0 may not save: {told[0].failed[0][1]}",
        )
        in_the_way.unlink()
        proxy.rule = lambda request: Fault(status=403) if request.method == "PUT" else None
        told = job.run(steps=2)
        assert [[*each.failed] for each in told] == [[1], [1]] and [each.durable for each in told] == [[0], [0]]
        assert told[0].failed[1][0] == "FailedSavesError" and "AccessDenied" in told[0].failed[1][1]
        assert told[1].failed[1] == ("PeerError", f"rank 0 may not save: {told[0].failed[1][1]}")
    finally:
        end_drains(tmp_path)
