"""Hundreds of saves of a sharded model: memory, descriptors and threads stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import Nursery, sharding_nurseries

SAVES = [100, 500]
# What a rank saves is more than 200 KiB, and what it says of its layout some KiB. 400 of the former, or 400 plans, would show.
MOST_GROWTH = 4 << 20

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(2) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("way", ["steps", "dcp"])
def test_five_hundred_saves(way: str, nurseries: list[Nursery], tmp_path: Path) -> None:
    request = {"way": way, "world": 2, "saves": SAVES, "directory": str(tmp_path), "meeting": str(tmp_path / "meeting")}
    children = [
        nursery.start(f"from dist import many_saves; many_saves.main({request | {'rank': rank}!r})")
        for rank, nursery in enumerate(nurseries)
    ]
    ended = [child.wait() for child in children]
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    for each in ended:
        early, late = (json.loads(line) for line in each.stdout.splitlines() if line.startswith("{"))
        assert late["memory_bytes"] - early["memory_bytes"] < MOST_GROWTH
        assert (late["threads"], late["descriptors"], late["children"]) == (early["threads"], early["descriptors"], 0)
