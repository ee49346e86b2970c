"""A training process is killed with SIGKILL, at every named crash point and at any moment; what it had saved is there."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_child
import pytest
import torch
from choice import mostly_slow
from drain_points import (
    DRAIN_FILES,
    DRAIN_POINTS,
    FAILURE_FILES,
    FAILURE_POINTS,
    RUN_POINTS,
    SPREAD_POINTS,
    UPLOAD_FILES,
    UPLOAD_POINTS,
)
from nursery import Child, Ended, Nursery, shared_nursery
from places import ROOT

import ckpt

# Where a save can be killed; a test compares this list with the source. The number of times that a save of the toy model
# passes each, roughly, tells which skips make sense.
POINTS = {
    "preallocated": 1,
    "chunk-written": 38,
    "chunks-written": 1,
    "data-durable": 1,
    "before-rename": 1,
    "renamed": 1,
    "prepared": 1,
    "manifest-written": 1,
    "manifest-renamed": 1,
    "latest-written": 1,
    "latest-renamed": 1,
    "published": 1,
    "tidied": 1,
    "removal-begun": 1,
}
DISTRIBUTED_POINTS = ["shares-written"]  # tests/commit/test_commit.py kills there
NODE_POINTS = ["node-gathered", "node-posted", "node-heard"]  # tests/commit/test_commit_by_node.py
REUSE_POINTS = ["blocks-shared", "frozen-linked"]  # tests/saving/test_reuse_processes.py, test_frozen_processes.py
COPY_POINTS = ["copied", "copy-complete"]  # tests/cli/test_copy.py
BUNDLE_POINTS = [
    *("placed", "all-placed"),  # tests/integrations/test_deepspeed_crash.py
    *("bundle-exchanged", "bundle-retired", "bundle-named"),  # tests/commit/test_late_names.py
]
SMALL_FILES = ("manifest", "latest", "metadata", "metadata-copy", *DRAIN_FILES, *FAILURE_FILES, *UPLOAD_FILES)
SHARDED_POINTS = [f"metadata{part}-{end}" for part in ("", "-copy") for end in ("written", "renamed")]  # tests/sharded
FILE_POINTS = ["preallocated", "chunk-written", "chunks-written", "data-durable", "before-rename", "renamed"]

pytestmark = pytest.mark.usefixtures("native")


class Killed:
    """What a child said before it was killed, or ended by itself."""

    def __init__(self, ended: Ended) -> None:
        self.returncode = ended.returncode
        self.begun = "begun" in ended.stdout
        # The steps that it said were durable, in this order. The last line may have been cut off.
        self.durable = [int(step) for step in re.findall(r"^durable (\d+)$", ended.stdout, re.MULTILINE)]
        if ended.returncode != -signal.SIGKILL:
            assert ended.returncode == 0, ended.stderr


def start(nursery: Nursery, directory: Path, work: str = "train", **request: Any) -> Child:
    defaults = {"keep": 2, "again": False, "steps": 100_000, "crash_point": "", "crash_skip": 0}
    request = defaults | {"directory": str(directory)} | request
    return nursery.start(f"import crash_child; crash_child.{work}({request!r}); crash_child.leave()")


def run(nursery: Nursery, directory: Path, work: str = "train", **request: Any) -> Killed:
    return Killed(start(nursery, directory, work, **request).wait())


def run_to_crash_point(nursery: Nursery, directory: Path, work: str = "train", **request: Any) -> Killed:
    killed = run(nursery, directory, work, **request)
    assert killed.returncode == -signal.SIGKILL, "it never came to the crash point"
    return killed


def run_and_kill(nursery: Nursery, directory: Path, delay_s: float, work: str = "train", **request: Any) -> Killed:
    child = start(nursery, directory, work, **request)
    child.kill_after(delay_s)
    killed = Killed(child.wait())
    assert killed.returncode == -signal.SIGKILL
    return killed


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with shared_nursery(optimizer=True) as nursery:
        yield nursery


class Reference:
    """The digests of the states of an uninterrupted run, computed as far as asked for."""

    def __init__(self) -> None:
        self._trainer = crash_child.Trainer()
        self._digests: list[str] = []

    def digest(self, step: int) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        while len(self._digests) <= step:
            self._trainer.advance()
            self._digests.append(crash_child.digest(self._trainer.state()))
        torch.set_num_threads(threads)
        return self._digests[step]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def check(directory: Path, reference: Reference, durable: list[int]) -> int:
    """What stands after a crash is whole and right, and nothing durable is lost. Returns the step found; -1: none."""
    latest = directory / "latest"
    with ckpt.Checkpointer(directory, options=crash_child.OPTIONS) as checkpointer:
        steps = checkpointer.steps()
        for step in steps:
            state = ckpt.load(directory / f"step-{step:012d}" / state_file(directory, step))
            assert crash_child.digest(state) == reference.digest(step), f"step {step} is not what was saved"
        if latest.exists():
            assert int(latest.read_text().strip().removeprefix("step-")) in steps
        found = checkpointer.restore()
    if found is None:
        assert not durable and not latest.exists()
        return -1
    assert crash_child.digest(found.state) == reference.digest(found.step)
    assert found.step >= max(durable, default=-1)
    return found.step


def state_file(directory: Path, step: int) -> str:
    manifest = json.loads((directory / f"step-{step:012d}" / "manifest.json").read_text())
    assert manifest["step"] == step
    return manifest["files"][0]["name"]


def assert_tidy(directory: Path) -> None:
    """Nothing is there but `latest`, what has been told, and whole checkpoints."""
    for path in directory.iterdir():
        if path.is_dir():
            step = int(path.name.removeprefix("step-"))
            assert sorted(entry.name for entry in path.iterdir()) == ["manifest.json", state_file(directory, step)]
        else:
            assert path.name in ("latest", ".lock", "events.jsonl")


def save_once_more(nursery: Nursery, directory: Path, reference: Reference, at_least: int) -> None:
    """A new process resumes, saves, and finds nothing in its way."""
    ended = run(nursery, directory, steps=2)
    assert ended.returncode == 0
    assert check(directory, reference, ended.durable) == at_least + 2
    assert_tidy(directory)


# ---- crash points ----------------------------------------------------------------------------------------------------


def test_the_list_of_crash_points_is_complete() -> None:
    found = set()
    for path in [*(ROOT / "csrc").rglob("*.cc"), *(ROOT / "ckpt").rglob("*.py")]:
        found |= set(re.findall(r'crash_point\(f?"([^"]+)"\)', path.read_text()))
    small_files = {point for point in found if point.startswith("{crash_name}")}
    assert small_files, "replace_durably() has crash points"
    found -= small_files
    found |= {point.format(crash_name=name) for point in small_files for name in SMALL_FILES}
    of_tiers = {*DRAIN_POINTS, *FAILURE_POINTS, *RUN_POINTS, *SPREAD_POINTS, *UPLOAD_POINTS}
    assert found == {
        *POINTS,
        *DISTRIBUTED_POINTS,
        *NODE_POINTS,
        *COPY_POINTS,
        *REUSE_POINTS,
        *BUNDLE_POINTS,
        *SHARDED_POINTS,
        *of_tiers,
    }


MODES = ["steps", "again", "keep one"]
MANY_MODES = [(point, mode) for number, point in enumerate(POINTS) for mode in ("steps", MODES[1 + number % 2])]


@pytest.mark.parametrize(("point", "mode"), mostly_slow([(p, mode) for p in POINTS for mode in MODES], run=MANY_MODES))
def test_killed_at_a_crash_point(point: str, mode: str, nursery: Nursery, reference: Reference, tmp_path: Path) -> None:
    keep, again, per_save = 1 if mode == "keep one" else 2, mode == "again", POINTS[point]
    for skip in (0, per_save // 2, 2 * per_save, 5 * per_save - 1):
        directory = tmp_path / f"skip-{skip}"
        directory.mkdir(exist_ok=True)
        killed = run_to_crash_point(nursery, directory, steps=40, keep=keep, again=again, crash_point=point, crash_skip=skip)
        step = check(directory, reference, killed.durable)
        save_once_more(nursery, directory, reference, step)


def test_killed_again_and_again_at_the_same_point(nursery: Nursery, reference: Reference, tmp_path: Path) -> None:
    for point in ("renamed", "manifest-renamed", "latest-written", "removal-begun", "data-durable"):
        for _ in range(3):
            killed = run_to_crash_point(nursery, tmp_path, keep=1, again=True, crash_point=point, crash_skip=1)
            step = check(tmp_path, reference, killed.durable)
    save_once_more(nursery, tmp_path, reference, step)


# ---- any moment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [24, pytest.param(1500, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills: int, nursery: Nursery, reference: Reference, tmp_path: Path) -> None:
    """One run, killed and resumed over and over in the same directory, and more often where a busy machine slows it down."""
    moments = random.Random(20240607)
    step, killed_in_training, kill = -1, 0, 0
    while kill < kills or step <= kills or killed_in_training <= kills / 2:
        assert kill < 8 * kills, "the run makes progress in spite of all"
        again, keep = moments.random() < 0.3, moments.choice([1, 2, 3])
        killed = run_and_kill(nursery, tmp_path, moments.uniform(0.0, 0.25), keep=keep, again=again)
        killed_in_training += killed.begun
        found = check(tmp_path, reference, killed.durable)
        assert found >= step, f"kill {kill} took the run back"
        step = found
        kill += 1
        if kill % 20 == 0:
            save_once_more(nursery, tmp_path, reference, step)
            step += 2
    save_once_more(nursery, tmp_path, reference, step)


# ---- single files ----------------------------------------------------------------------------------------------------


def check_file(directory: Path, durable: list[int]) -> None:
    path = directory / "model.pt"
    if not path.exists():
        assert not durable
        return
    state = ckpt.load(path)
    assert state["step"] >= max(durable, default=0)
    assert torch.equal(state["weights"], crash_child.file_state(state["step"])["weights"])


@pytest.mark.parametrize("point", FILE_POINTS)
def test_a_single_file_save_is_killed_at_a_crash_point(point: str, nursery: Nursery, tmp_path: Path) -> None:
    for skip in (0, 1, 60 if point == "chunk-written" else 3):
        killed = run_to_crash_point(nursery, tmp_path, "save_one_file", crash_point=point, crash_skip=skip)
        check_file(tmp_path, killed.durable)


def test_a_single_file_save_is_killed_at_any_moment(nursery: Nursery, tmp_path: Path) -> None:
    moments = random.Random(11)
    for _ in range(25):
        check_file(tmp_path, run_and_kill(nursery, tmp_path, moments.uniform(0.0, 0.15), "save_one_file").durable)


def test_the_next_save_of_a_file_removes_what_a_crash_has_left(nursery: Nursery, tmp_path: Path) -> None:
    run_to_crash_point(nursery, tmp_path, "save_one_file", crash_point="data-durable", crash_skip=1)
    assert len(list(tmp_path.iterdir())) == 2
    assert run(nursery, tmp_path, "save_one_file", steps=1).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_child_that_is_not_killed_ends_well(nursery: Nursery, reference: Reference, tmp_path: Path) -> None:
    ended = run(nursery, tmp_path, steps=5)
    assert ended.returncode == 0
    assert ended.durable == [0, 1, 2, 3, 4]
    assert check(tmp_path, reference, ended.durable) == 4
