"""Ranks on two nodes, two on each, which speak to rank 0 by node, and one of them is killed: at each point of the protocol.

The leader of a node speaks for the other rank, so that one must be heard all the same: who is named is who is dead.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from background import Result, side_by_side
from dist.coordinator_nodes import LEADER, MEMBER, NODE_POINTS
from nursery import Nursery, nurseries_of_ranks
from test_commit import (
    ALL_RANKS,
    LEFT_ALONE,
    Told,
    assert_survived,
    assert_whole,
    expected_digest,
    free_port,
    runner,
    starter,
)

RANKS = 4
LANES = 3
PLACES = [{"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": str(rank // 2)} for rank in range(RANKS)]
# Before it has answered, it matters little where a rank dies: each point is tried with one of the two, the last one with both.
KILLS: list[Any] = [(point, (LEADER, MEMBER)[number % 2]) for number, point in enumerate(ALL_RANKS)] + [(ALL_RANKS[-1], LEADER)]
OTHERS = [kill for kill in itertools.product(ALL_RANKS, (LEADER, MEMBER)) if kill not in KILLS]
KILLS += [pytest.param(*kill, marks=pytest.mark.slow) for kill in OTHERS]
KILLS += [(point, 0) for point in ("shares-written", "manifest-renamed", "published")]
KILLS += [(point, LEADER) for point in NODE_POINTS] + [("node-gathered", 0), ("node-posted", 0)]
GROUP_KILLS = [("prepared", LEADER), ("prepared", MEMBER), ("published", 0)]
GROUP_KILLS += [(point, LEADER) for point in NODE_POINTS]

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(RANKS, optimizer=True) as made:
        yield made


@pytest.fixture(scope="module")
def begun(
    nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Result]:
    expected_digest(0)  # once, before there are threads
    with contextlib.ExitStack() as stack:
        lanes = [[stack.enter_context(nursery.another()) for nursery in nurseries] for _ in range(LANES)]
        bodies = {
            "test_a_rank_is_killed_at_any_point": killed_at_a_point,
            "test_a_rank_of_a_process_group_is_killed": killed_at_a_point_with_a_process_group,
        }
        yield stack.enter_context(side_by_side(request, bodies, lanes, tmp_path_factory))


@pytest.mark.parametrize(("point", "victim"), KILLS)
def test_a_rank_is_killed_at_any_point(point: str, victim: int, begun: Result, request: pytest.FixtureRequest) -> None:
    begun(request)


@pytest.mark.parametrize(("point", "victim"), GROUP_KILLS)
def test_a_rank_of_a_process_group_is_killed(point: str, victim: int, begun: Result, request: pytest.FixtureRequest) -> None:
    """Which agrees by the store of torch.distributed."""
    begun(request)


def each_with(**more: Any) -> list[dict[str, Any]]:
    return [{"environment": place} | more for place in PLACES]


def killed_at_a_point(lane: list[Nursery], directory: Path, point: str, victim: int, **more: Any) -> None:
    start = starter(lane, directory)
    requests = each_with()
    requests[victim] |= {"crash_point": point, "crash_skip": 2}
    told = start(*requests, world=RANKS, steps=7, **(more or {"keep": 2}), **LEFT_ALONE).end()
    assert told[victim].ended.returncode == -signal.SIGKILL
    survivors = [rank for rank in range(RANKS) if rank != victim]
    for rank in survivors:
        assert_survived(told[rank], victim)
        if victim != 0:
            assert_only(told[rank], victim)
    durable = max(step for rank in told for step in (-1, *rank.durable))
    assert assert_whole(directory, RANKS) >= durable >= 0
    again = runner(start)(*each_with(), world=RANKS, steps=2)
    assert all(rank.found == again[0].found for rank in again), "all ranks resume from the same step"
    assert again[0].found is not None and again[0].found[0] >= durable
    for rank in again:
        assert rank.durable == [again[0].found[0] + 1, again[0].found[0] + 2] and not rank.failed
    assert assert_whole(directory, RANKS, *again) == again[0].found[0] + 2
    assert not [path for path in directory.rglob("*") if ".tmp-" in path.name], "a crash has left something"


def assert_only(told: Told, victim: int) -> None:
    """Nobody is named who lives."""
    for _, text in told.failed.values():
        assert f"rank {victim} did not answer" in text, text


def killed_at_a_point_with_a_process_group(lane: list[Nursery], directory: Path, point: str, victim: int) -> None:
    killed_at_a_point(lane, directory, point, victim, coordinator="torch", port=free_port())


def test_ranks_of_two_nodes_save_and_resume(nurseries: list[Nursery], tmp_path: Path) -> None:
    """And with other nodes: each number of ranks forms its own. A slow member is waited for, whose leader has long answered."""
    run = runner(starter(nurseries, tmp_path))
    requests = each_with()
    requests[MEMBER]["plan"] = {"1": {"fault": {"call": "fdatasync", "delay_s": 0.8}}}
    first = run(*requests, world=RANKS, steps=4, wait=False)
    assert [rank.durable for rank in first] == [[0, 1, 2, 3]] * RANKS
    assert assert_whole(tmp_path, RANKS, *first) == 3
    second = run(*each_with()[:3], world=3, steps=2)
    assert [rank.found for rank in second] == [(3, expected_digest(3), 3)] * 3
    assert [rank.durable for rank in second] == [[4, 5]] * 3
    third = run(world=2, steps=1)
    assert [rank.found for rank in third] == [(5, expected_digest(5), 5)] * 2


@pytest.mark.parametrize("coordinator", ["file", "torch"])
def test_the_error_of_one_rank_reaches_all(coordinator: str, nurseries: list[Nursery], tmp_path: Path) -> None:
    requests = each_with(coordinator=coordinator, port=free_port())
    steps = {LEADER: 1, MEMBER: 2}
    for victim, step in steps.items():
        fault = {"call": "fdatasync", "path_part": f"rank-{victim:05d}", "error": 28}
        requests[victim]["plan"] = {f"{step}": {"fault": fault}}
    told = runner(starter(nurseries, tmp_path))(*requests, world=RANKS, steps=4)
    assert [rank.durable for rank in told] == [[0, 3]] * RANKS
    for victim, step in steps.items():
        assert told[victim].failed[step][0] == "StorageError"
        for rank in {*range(RANKS)} - {victim}:
            kind, text = told[rank].failed[step]
            assert kind == "PeerError" and f"rank {victim}" in text and "No space left" in text
