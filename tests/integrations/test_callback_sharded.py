"""CheckpointCallback with sharded models: killed, resumed on as many ranks and on others, with the same bits."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from choice import mostly_slow
from nursery import Nursery, sharding_nurseries
from torch.distributed.checkpoint import FileSystemReader

STEPS = 8
HOW = {"fsdp": 2, "tensor parallel": 2, "sharded buffer": 2, "hybrid": 4, "recomputed": 2}
HOW |= {"fsdp1": 2, "fsdp1 inside": 2, "fsdp1 hybrid": 4}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(4) as made:
        yield made


class Jobs:
    def __init__(self, nurseries: list[Nursery], where: Path) -> None:
        self._nurseries, self._where, self._runs = nurseries, where, 0

    def run(self, name: str, how: str, world: int, killed: bool = False, **request: Any) -> list[dict[str, Any]]:
        """What each rank has said."""
        self._runs += 1
        given = {"directory": str(self._where / name), "meeting": str(self._where / f"meeting-{self._runs}"), "how": how}
        given |= {"world": world, "steps": STEPS} | request
        children = [
            self._nurseries[rank].start(f"from dist import sharded_training; sharded_training.main({given | {'rank': rank}!r})")
            for rank in range(world)
        ]
        ended = [child.wait() for child in children]
        assert [each.returncode for each in ended] == [-signal.SIGKILL if killed else 0] * world, ended[0].stderr
        return [] if killed else [json.loads(each.stdout.splitlines()[-1]) for each in ended]


@pytest.fixture
def jobs(nurseries: list[Nursery], tmp_path: Path) -> Jobs:
    return Jobs(nurseries, tmp_path)


@pytest.mark.parametrize("how", HOW)
def test_killed_and_resumed(how: str, jobs: Jobs) -> None:
    """In the middle of a save, on all ranks at once."""
    world = HOW[how]
    (through, *others) = jobs.run("through", how, world)
    assert "error" not in through, through
    assert through["found"] == 0 and all(other["digests"] == through["digests"] for other in others)
    jobs.run("killed", how, world, killed=True, kill_at=6)
    resumed = jobs.run("killed", how, world, seed=1)
    for each in resumed:
        assert 4 <= each["found"] <= 6
        assert each["resumed"] == through["digests"][str(each["found"])]
        assert each["digests"] == {step: value for step, value in through["digests"].items() if int(step) > each["found"]}


@pytest.mark.parametrize("how", ["fsdp", "fsdp1"])
def test_killed_and_resumed_by_way_of_a_node(how: str, jobs: Jobs, tmp_path: Path) -> None:
    """What landed is resumed from, whether it has come home or not; then another number of ranks resumes what came home."""
    nodes = [str(tmp_path / "node")]
    (through, *_) = jobs.run("through", how, 2)
    jobs.run("killed", how, 2, killed=True, kill_at=6, nodes=nodes)
    for each in jobs.run("killed", how, 2, seed=1, nodes=nodes):
        assert 4 <= each["found"] <= 6 and each["resumed"] == through["digests"][str(each["found"])]
    for each in jobs.run("killed", how, 1, steps=STEPS, seed=1, nodes=nodes):
        assert each["found"] == STEPS and each["resumed"] == through["digests"][str(STEPS)]


RESHARDED = [(before, after, saved) for saved in ("fsdp", "fsdp1", "recomputed") for before, after in ((2, 1), (1, 2), (2, 4))]
MANY_RESHARDED = [(2, 1, "fsdp"), (1, 2, "fsdp"), (2, 4, "fsdp"), (1, 2, "fsdp1"), (2, 1, "recomputed")]


@pytest.mark.parametrize(("before", "after", "saved"), mostly_slow(RESHARDED, run=MANY_RESHARDED))
def test_resumed_on_another_number_of_ranks(before: int, after: int, saved: str, jobs: Jobs) -> None:
    """And with another way of sharding."""
    (through, *_) = jobs.run("saved", saved, before, steps=4)
    for how in ("fsdp", "tensor parallel", "fsdp1"):
        resumed = jobs.run("saved", how, after, steps=4, seed=1)
        assert {each["found"] for each in resumed} == {4}
        assert {each["resumed"] for each in resumed} == {through["digests"]["4"]}


@pytest.mark.parametrize(("how", "world"), [("fsdp", 2), ("fsdp1", 2), ("fsdp1", 1)])
def test_what_is_written_behind_the_fence_is_not_saved(how: str, world: int, jobs: Jobs) -> None:
    """While writes are slow. FSDP1 on one rank shards nothing: torch gives what is there, and no copies."""
    (through, *_) = jobs.run("saved", how, world, steps=1, spoilt=True)
    for each in jobs.run("saved", how, world, steps=1, seed=1):
        assert each["found"] == 1 and each["resumed"] == through["digests"]["1"]


def test_torch_reads_it(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run("saved", "fsdp", 2, steps=2)
    metadata = FileSystemReader(tmp_path / "saved" / "step-000000000002").read_metadata()
    keys = set(metadata.state_dict_metadata)
    assert {"model.up.weight", "model.frozen", "optimizer.state.up.weight.exp_avg", "optimizer.param_groups.0.lr"} <= keys
    assert "model.norm.running_mean" not in keys, "each rank's own"


@pytest.mark.parametrize("how", ["fsdp", "fsdp1"])
def test_an_optimizer_that_has_not_stepped_when_it_is_saved(how: str, jobs: Jobs) -> None:
    """To save it makes no steps: the training goes on as without."""
    (through, *_) = jobs.run("through", how, 2, steps=3)
    (early, *_) = jobs.run("early", how, 2, steps=0, save_first=True)
    assert early["digests"] == {}
    resumed = jobs.run("early", how, 2, steps=3, seed=1)
    assert {each["found"] for each in resumed} == {0} and [each["digests"] for each in resumed] == [through["digests"]] * 2


@pytest.mark.parametrize(("before", "after"), [([], ["added"]), (["gone"], [])])
def test_what_only_one_side_has_is_told_of(before: list[str], after: list[str], jobs: Jobs) -> None:
    jobs.run("saved", "fsdp", 2, steps=1, more=before)
    (name,) = before + after
    for said in jobs.run("saved", "fsdp", 2, steps=1, more=after):
        assert f"'model.{name}' is " in said["error"]
    for said in jobs.run("saved", "fsdp", 2, steps=1, more=after, strict=False):
        assert said["found"] == 1 and f"'model' of checkpoint 1: only one side has {name}" in said["log"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_with_other_parameters_is_refused(world: int, jobs: Jobs) -> None:
    jobs.run("saved", "fsdp", 2, steps=1)
    for said in jobs.run("saved", "fsdp", world, steps=2, hidden=40):
        assert "does not fit sharded_into=" in said["error"] and "model.up.weight" in said["error"]
