"""A job that saves with other nodes and ranks than the one before: what that has left on the nodes comes home all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from node_roots import Job, MiB, crash_at, drain_once, drain_well

from ckpt.directory import manifest as manifests
from ckpt.directory.step_names import step_name


def drain_all(job: Job) -> None:
    for root in (*job.roots, *job.roots):
        drain_well(root)


# What the next job writes into node.json of each node.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "more ranks": [{"ranks": [0, 1], "world_size": 4}, {"ranks": [2, 3], "world_size": 4}],
    "one node": [{"node": 0, "nodes": 1, "ranks": [0, 1]}, {}],
    "three nodes": [{"nodes": 3, "ranks": [0]}, {"node": 2, "nodes": 3, "ranks": [2]}],
    "other numbers": [{"node": 1, "ranks": [1]}, {"node": 0, "ranks": [0]}],
}


@pytest.mark.parametrize("other", OTHERS)
def test_each_generation_comes_home_as_it_was_made(other: str, tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2, home_every={"steps": 1})
    job.save(1, common=4 * MiB)
    job.save(2, common=4 * MiB)
    for node, said in enumerate(OTHERS[other]):
        job.describe(node, home_every={"steps": 1}, **said)
    drain_all(job)
    assert job.steps_at_home() == [1, 2]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("point", ["drain-chunk", "drain-all-copied", "drain-delivered"])
def test_the_numbers_change_while_it_is_on_its_way(point: str, tmp_path: Path) -> None:
    """Each node goes on under the number that it had, and takes nothing of the other for its own."""
    job = Job(tmp_path, nodes=2)
    job.save(1, common=4 * MiB)
    assert drain_once(job.roots[1], prepare=crash_at(point)).returncode < 0
    for node, said in enumerate(OTHERS["other numbers"]):
        job.describe(node, **said)
    drain_all(job)
    assert job.steps_at_home() == [1]
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_a_node_that_has_delivered_forgets_its_number_with_its_files_only(tmp_path: Path) -> None:
    """The step is saved again by one node alone, before the other has delivered the old one."""
    job = Job(tmp_path, nodes=2, home_every={"steps": 1})
    job.save(1)
    drain_well(job.roots[0])
    assert job.state(1) == "copied"
    job.describe(0, node=0, nodes=1, ranks=[0], home_every={"steps": 1})
    for path in (job.roots[0] / step_name(1)).iterdir():
        path.unlink()
    drain_well(job.roots[1])
    drain_well(job.roots[0])
    assert job.state(1) == job.state(1, 1) == "committed"
    job.assert_home_is_right()


@pytest.mark.parametrize("text", ["", '{"format": 1}'])
def test_without_receipts_that_say_so_the_description_counts(text: str, tmp_path: Path) -> None:
    """As an older version has left it; and once the drain has noted that, it stays."""
    job = Job(tmp_path, nodes=2)
    job.save(1, common=4 * MiB)
    for root in job.roots:
        for path in root.glob("step-*/receipt-*"):
            path.write_text(text)
    (job.home / ".run").rename(job.home / ".away")
    for root in job.roots:
        drain_once(root)
    (job.home / ".away").rename(job.home / ".run")
    for node, said in enumerate(OTHERS["other numbers"]):
        job.describe(node, **said)
    noted = [json.loads(next((root / "drain").glob("0*.json")).read_bytes())["place"] for root in job.roots]
    assert [place["number"] for place in noted] == [0, 1]
    drain_all(job)
    assert manifests.read(job.home / step_name(1)).sequence == 1
    job.assert_home_is_right()
