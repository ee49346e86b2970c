"""Sharded states of every kind, saved by 1, 2 and 4 ranks, and looked at by a process that has torch and not the library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dist import sharded_states
from nursery import Nursery, sharding_nurseries
from places import TESTS
from support import DEADLINE_S

READER = TESTS / "dist" / "torch_reader.py"
WORLDS = (1, 2, 4)
RUNS = [(case, world) for case, (_, worlds) in sharded_states.CASES.items() for world in worlds]
TRAINED = [(case, world) for case, world in RUNS if case not in ("placements", "grid", "apart", "fsdp1")]

pytestmark = pytest.mark.usefixtures("native")


def run_ranks(nurseries: list[Nursery], work: str, meeting: Path, world: int, **request: Any) -> list[dict[str, Any]]:
    """What all ranks have said."""
    request |= {"work": work, "world": world, "meeting": str(meeting)}
    children = [
        nurseries[rank].start(f"from dist import sharded_saves; sharded_saves.main({request | {'rank': rank}!r})")
        for rank in range(world)
    ]
    ended = [child.wait() for child in children]
    assert [each.returncode for each in ended] == [0] * world, "\n".join(each.stderr for each in ended)
    return [json.loads(line) for each in ended for line in each.stdout.splitlines() if line.startswith("{")]


class Saved:
    """All cases, of jobs of 1, 2 and 4 ranks.

    Attributes:
        directories: of each job.
        errors: what the reader found wrong, by case and ranks.
        stats: what each rank said of its saves, by the same.
    """

    def __init__(self, nurseries: list[Nursery], where: Path) -> None:
        self.directories = [where / str(world) for world in WORLDS]
        self.stats: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for world, directory in zip(WORLDS, self.directories, strict=True):
            directory.mkdir()
            for each in run_ranks(nurseries, "save_cases", where / f"meeting-{world}", world, directory=str(directory)):
                self.stats.setdefault((each["case"], world), []).append(each)
        command = [sys.executable, str(READER), *map(str, self.directories)]
        read = subprocess.run(command, capture_output=True, text=True, timeout=4 * DEADLINE_S, cwd="/")
        assert read.returncode == 0, read.stderr
        found = [json.loads(line) for line in read.stdout.splitlines() if line.startswith("{")]
        self.errors = {each["case"]: each["error"] for each in found}


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(4) as made:
        yield made


@pytest.fixture(scope="module")
def saved(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(nurseries, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(("case", "world"), RUNS)
def test_torch_alone_reads_what_was_saved(case: str, world: int, saved: Saved) -> None:
    """Bit for bit as it was at save(), though it was stepped behind the fence while writes were slow; described as by torch."""
    assert saved.errors[f"{case}-{world}"] == ""


def loads(world: int) -> list[tuple[str, int, int]]:
    """(case, ranks that saved it, `world`)."""
    cases = [case for case, (_, worlds) in sharded_states.CASES.items() if world in (worlds if world != 3 else (1, 2, 4, 3))]
    here = cases if world != 3 else ["fsdp", "placements"]
    return [(case, before, world) for case in here for before in sharded_states.CASES[case][1]]


@pytest.fixture(scope="module")
def loaded(
    nurseries: list[Nursery], saved: Saved, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, int], list[str]]:
    """What each rank found wrong with what restore() gave it."""
    found: dict[tuple[str, int, int], list[str]] = {}
    where = tmp_path_factory.mktemp("loads")
    for world in (1, 2, 3, 4):
        directories = [*map(str, saved.directories)]
        for each in run_ranks(nurseries, "load_cases", where / str(world), world, directories=directories):
            case, _, before = each["case"].rpartition("-")
            found.setdefault((case, int(before), world), []).append(each["error"])
    return found


@pytest.mark.parametrize(("case", "before", "world"), [each for world in (1, 2, 3, 4) for each in loads(world)])
def test_any_number_of_ranks_restores_it(
    case: str, before: int, world: int, loaded: dict[tuple[str, int, int], list[str]]
) -> None:
    assert loaded[case, before, world] == [""] * world


@pytest.mark.parametrize(("case", "world"), TRAINED)
def test_what_an_optimizer_writes_leaves_lazily(case: str, world: int, saved: Saved) -> None:
    assert len(saved.stats[case, world]) == world
    for rank in saved.stats[case, world]:
        assert rank["zero_copy"] + rank["at_fence"] > rank["in_save"]


@pytest.mark.parametrize(("case", "world"), [(case, world) for case, world in RUNS if case != "apart"])
def test_each_rank_writes_about_as_much(case: str, world: int, saved: Saved) -> None:
    sizes = [rank["total"] for rank in saved.stats[case, world]]
    assert max(sizes) < 1.2 * min(sizes)
