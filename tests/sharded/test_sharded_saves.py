"""Sharded states of every kind, saved by 1, 2 and 4 ranks, and looked at by a process that has torch and not the library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from dist import sharded_states
from nursery import Nursery, sharding_nurseries
from places import TESTS
from support import DEADLINE_S

READER = TESTS / "dist" / "torch_reader.py"
RUNS = [(case, world) for case, (_, worlds) in sharded_states.CASES.items() for world in worlds]
TRAINED = [(case, world) for case, world in RUNS if case not in ("placements", "grid", "apart", "fsdp1")]

pytestmark = pytest.mark.usefixtures("native")


def run_ranks(nurseries: list[Nursery], work: str, directory: Any, world: int) -> list[dict[str, Any]]:
    """What all ranks have said."""
    meeting = directory.with_name(f"{directory.name}-{work}-{world}")
    request = {"work": work, "world": world, "directory": str(directory), "meeting": str(meeting)}
    children = [
        nurseries[rank].start(f"from dist import sharded_saves; sharded_saves.main({request | {'rank': rank}!r})")
        for rank in range(world)
    ]
    ended = [child.wait() for child in children]
    assert [each.returncode for each in ended] == [0] * world, "\n".join(each.stderr for each in ended)
    return [json.loads(line) for each in ended for line in each.stdout.splitlines() if line.startswith("{")]


class Saved:
    """All cases of a job of so many ranks.

    Attributes:
        errors: what the reader found wrong, by case.
        stats: what each rank said of its saves, by case.
    """

    def __init__(self, nurseries: list[Nursery], directory: Any, world: int) -> None:
        self.directory = directory
        said = run_ranks(nurseries, "save_cases", directory, world)
        self.stats = {case: [each for each in said if each["case"] == case] for case in sharded_states.CASES}
        command = [sys.executable, str(READER), str(directory)]
        read = subprocess.run(command, capture_output=True, text=True, timeout=4 * DEADLINE_S, cwd="/")
        assert read.returncode == 0, read.stderr
        found = [json.loads(line) for line in read.stdout.splitlines() if line.startswith("{")]
        self.errors = {each["case"].rpartition("-")[0]: each["error"] for each in found}


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(4) as made:
        yield made


@pytest.fixture(scope="module")
def saved(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Saved]:
    return {world: Saved(nurseries, tmp_path_factory.mktemp(f"world{world}"), world) for world in (1, 2, 4)}


@pytest.mark.parametrize(("case", "world"), RUNS)
def test_torch_alone_reads_what_was_saved(case: str, world: int, saved: dict[int, Saved]) -> None:
    """Bit for bit as it was at save(), though it was stepped behind the fence while writes were slow; described as by torch."""
    assert saved[world].errors[case] == ""


def loads(world: int) -> list[tuple[str, int, int]]:
    """(case, ranks that saved it, `world`)."""
    cases = [case for case, (_, worlds) in sharded_states.CASES.items() if world in (worlds if world != 3 else (1, 2, 4, 3))]
    here = cases if world != 3 else ["fsdp", "placements"]
    return [(case, before, world) for case in here for before in sharded_states.CASES[case][1]]


@pytest.fixture(scope="module")
def loaded(nurseries: list[Nursery], saved: dict[int, Saved]) -> dict[tuple[str, int, int], list[str]]:
    """What each rank found wrong with what restore() gave it."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for before, job in saved.items():
        for world in (1, 2, 3, 4):
            for each in run_ranks(nurseries, "load_cases", job.directory, world):
                case, _, ranks = each["case"].rpartition("-")
                assert int(ranks) == before
                found.setdefault((case, before, world), []).append(each["error"])
    return found


@pytest.mark.parametrize(("case", "before", "world"), [each for world in (1, 2, 3, 4) for each in loads(world)])
def test_any_number_of_ranks_restores_it(
    case: str, before: int, world: int, loaded: dict[tuple[str, int, int], list[str]]
) -> None:
    assert loaded[case, before, world] == [""] * world


@pytest.mark.parametrize(("case", "world"), TRAINED)
def test_what_an_optimizer_writes_leaves_lazily(case: str, world: int, saved: dict[int, Saved]) -> None:
    assert len(saved[world].stats[case]) == world
    for rank in saved[world].stats[case]:
        assert rank["zero_copy"] + rank["at_fence"] > rank["in_save"]


@pytest.mark.parametrize(("case", "world"), [(case, world) for case, world in RUNS if case != "apart"])
def test_each_rank_writes_about_as_much(case: str, world: int, saved: dict[int, Saved]) -> None:
    sizes = [rank["total"] for rank in saved[world].stats[case]]
    assert max(sizes) < 1.2 * min(sizes)
