"""What a Checkpointer has saved on a node comes home, and another one restores it there: also a sharded state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from node_roots import Job, drain_well
from support import options

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.directory.step_names import step_name


def sharded(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"weights": torch.randn(1000, 300, generator=generator), "numbers": [seed, 2]}


def save_on_node(job: Job, step: int, **state: Any) -> None:
    with ckpt.Checkpointer(job.roots[0], options=options(), coordinator="local") as checkpointer:
        checkpointer.restore(fresh=True)
        checkpointer.save(step, **state).result(60)


@pytest.mark.parametrize("again", [False, True])
def test_a_sharded_state(again: bool, tmp_path: Path, native: object) -> None:
    job = Job(tmp_path)
    seeds = (3, 4, 5)
    for seed in seeds:
        save_on_node(job, 1 if again else seed, sharded=sharded(seed))
        drain_well(job.roots[0])
        target = {"weights": torch.zeros(1000, 300), "numbers": [0, 0]}
        with ckpt.Checkpointer(job.home, options=options(), coordinator="local") as checkpointer:
            found = checkpointer.restore(sharded_into=target)
            assert found is not None and found.step == (1 if again else seed)
        assert torch.equal(target["weights"], sharded(seed)["weights"]) and target["numbers"] == [seed, 2]
        # Readers of torch look for this name alone.
        on_node, at_home = (base / step_name(found.step) / ".metadata" for base in (job.roots[0], job.home))
        assert at_home.read_bytes() == on_node.read_bytes()
    assert job.steps_at_home() == ([1] if again else [*seeds])
    if again:
        directory = job.home / step_name(1)
        names = manifests.names(manifests.read(directory).files) | {".metadata", "manifest.json"}
        assert {path.name for path in directory.iterdir()} == names


def test_a_job_goes_on_at_home(tmp_path: Path, native: object) -> None:
    """It resumes what was drained, and saves straight home while a drain brings something newer."""
    job = Job(tmp_path)
    for step in (1, 2):
        save_on_node(job, step, state={"step": step})
    drain_well(job.roots[0])
    with ckpt.Checkpointer(job.home, options=options()) as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.state == {"step": 2}
        checkpointer.save(3, {"step": 3}).result(60)
        for step in (4, 5):  # with the numbers 3 and 4
            save_on_node(job, step, state={"step": step})
        drain_well(job.roots[0])
        assert checkpointer.steps() == [2, 3, 5]
        found = checkpointer.restore()
        assert found is not None and found.state == {"step": 5}
