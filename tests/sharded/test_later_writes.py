"""What training writes while a save is on its way is not in it: statistics by the next forward, weights by the next step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery, sharding_nurseries

BY_A_FORWARD = {"model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"}
BY_A_STEP = {"model.up.weight", "model.norm.weight", "optimizer.state.up.weight.exp_avg", "optimizer.state.up.weight.step"}

pytestmark = pytest.mark.usefixtures("native")

Said = Callable[[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(2) as made:
        yield made


@pytest.fixture
def said(nurseries: list[Nursery], tmp_path: Path) -> Said:
    def said(way: str, world: int) -> list[dict[str, Any]]:
        request = {"way": way, "world": world, "directory": str(tmp_path), "meeting": str(tmp_path / "meeting")}
        children = [
            nurseries[rank].start(f"from dist import later_writes; later_writes.main({request | {'rank': rank}!r})")
            for rank in range(world)
        ]
        ended = [child.wait() for child in children]
        assert [each.returncode for each in ended] == [0] * world, "\n".join(each.stderr for each in ended)
        found = [json.loads(each.stdout.splitlines()[-1]) for each in ended]
        assert all(set(each["trained"]) >= BY_A_FORWARD | BY_A_STEP for each in found), "or there is nothing to be seen"
        return found

    return said


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("way", ["checkpointer", "dcp"])
def test_nothing_later_is_saved(way: str, world: int, said: Said) -> None:
    assert [each["changed"] for each in said(way, world)] == [[]] * world


@pytest.mark.parametrize("world", [1, 2])
def test_staging_of_torch_in_the_background_saves_both(world: int, said: Said) -> None:
    """The test above can fail. (By default torch copies all before async_save() returns.)"""
    for each in said("stock", world):
        assert set(each["changed"]) >= BY_A_FORWARD | BY_A_STEP
