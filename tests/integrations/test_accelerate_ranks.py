"""Jobs with accelerate, of one rank and of two: killed at every point of a save, they resume and end as the undisturbed one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

from choice import mostly_slow
from dist.accelerate_nursery import AccelerateNursery, training_program
from dist.deepspeed_nursery import free_port
from nursery import Child, Ended, Nursery, nurseries_of_ranks

pytestmark = pytest.mark.usefixtures("native")

STEPS = 8  # more than one epoch of one rank, and in the middle of one when it is killed
DETECTED_S = 0.3  # the ranks that are left go on for so long, as under a launcher, before it ends them

# Where a rank can be killed while a state is saved.
EVERY_RANK = ("chunk-written", "data-durable", "prepared")
RANK_0_ONLY = ("manifest-renamed", "all-placed", "bundle-named")


@dataclasses.dataclass
class Life:
    """What the ranks of a job said and left, from its start to its end or to when it was killed."""

    ended: list[Ended]
    outcomes: list[dict[str, Any] | None]

    def said(self, what: str) -> list[list[tuple[int, str]]]:
        """For each rank, steps and what else stands there."""
        lines = [re.findall(rf"^{what} (\d+)(?: (\w+))?$", rank.stdout, re.MULTILINE) for rank in self.ended]
        return [[(int(step), rest) for step, rest in each] for each in lines]

    @property
    def durable(self) -> int:
        return max((step for rank in self.said("durable") for step, _ in rank), default=0)


class Job:
    """Ranks that train in one directory, again and again."""

    def __init__(self, nurseries: list[Nursery], where: Path, module: str = "accelerate_training", **plan: Any) -> None:
        self._nurseries, self._where, self._module, self._plan = nurseries, where, module, plan
        self._lives = 0

    @property
    def directory(self) -> Path:
        return self._where / "project"

    def live(self, first: int = 0, **more: Any) -> Life:
        """Until the end, or until rank `first` has been killed, by itself, and the others soon after."""
        self._lives += 1
        outcomes = self._where / f"life-{self._lives}"
        outcomes.mkdir(parents=True)
        plan = {"directory": str(self.directory), "outcomes": str(outcomes), "steps": STEPS} | self._plan | more
        port, ranks = free_port(), len(self._nurseries)
        children: list[Child] = [
            nursery.start(training_program(plan, rank, ranks, port, self._module))
            for rank, nursery in enumerate(self._nurseries)
        ]
        ended: dict[int, Ended] = {}
        for rank in sorted(range(ranks), key=lambda rank: rank != first):
            if any(before.returncode for before in ended.values()):
                children[rank].kill_after(DETECTED_S)
            ended[rank] = children[rank].wait()
        paths = [outcomes / f"outcome.{rank}.json" for rank in range(ranks)]
        read = [json.loads(path.read_text()) if path.exists() else None for path in paths]
        return Life([ended[rank] for rank in range(ranks)], read)

    def whole(self, **more: Any) -> list[dict[str, Any]]:
        """What each rank computes in a life that nobody ends."""
        life = self.live(**more)
        assert [rank.returncode for rank in life.ended] == [0] * len(life.ended), "".join(rank.stderr for rank in life.ended)
        outcomes = [outcome for outcome in life.outcomes if outcome is not None]
        assert len(outcomes) == len(life.ended)
        return outcomes

    def end(self, reference: list[dict[str, Any]], at_least: int, **more: Any) -> None:
        """Resumes from what was saved last, computes the same, and leaves no rubbish."""
        for outcome, expected in zip(self.whole(**more), reference, strict=True):
            for name in ("digests", "losses"):
                assert outcome[name].items() <= expected[name].items(), f"a resumed run has other {name}"
            assert str(STEPS) in outcome["digests"]
            assert min(map(int, outcome["digests"])) >= at_least, "something newer was durable"
        assert not [path for path in self.directory.rglob("*") if path.name.startswith((".tmp-", ".lazyckpt-"))]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2, AccelerateNursery) as made:
        yield made


class References:
    """What the ranks of undisturbed jobs compute, as far as asked for."""

    def __init__(self, nurseries: list[Nursery], where: Path) -> None:
        self._nurseries, self._where = nurseries, where
        self._known: dict[str, list[dict[str, Any]]] = {}

    def of(self, ranks: int, **plan: Any) -> list[dict[str, Any]]:
        """Without this library."""
        name = f"{ranks}-{plan}"
        if name not in self._known:
            where = self._where / str(len(self._known))
            self._known[name] = Job(self._nurseries[:ranks], where, **plan).whole(stock=True)
        return self._known[name]


@pytest.fixture(scope="module")
def references(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(nurseries, tmp_path_factory.mktemp("references"))


def check_found(life: Life, reference: list[dict[str, Any]]) -> None:
    """What a rank has resumed from is what the undisturbed run was in."""
    for found, expected in zip(life.said("found"), reference, strict=True):
        assert {str(step): digest for step, digest in found}.items() <= expected["digests"].items()


CASES = [(ranks, point, 0) for ranks in (1, 2) for point in (*EVERY_RANK, *RANK_0_ONLY)]
CASES += [(2, point, 1) for point in EVERY_RANK]
SOME = {(1, "data-durable", 0), (2, "prepared", 1), (2, "manifest-renamed", 0), (2, "bundle-named", 0)}


@pytest.mark.parametrize(
    ("ranks", "point", "rank"),
    mostly_slow(CASES, run=SOME),
)
def test_killed_at_a_crash_point(
    ranks: int, point: str, rank: int, nurseries: list[Nursery], references: References, tmp_path: Path
) -> None:
    number = CASES.index((ranks, point, rank))
    job, reference = Job(nurseries[:ranks], tmp_path), references.of(ranks)
    crash = {"crash_point": point, "crash_skip": 2 + number % 3, "crash_rank": rank}
    life = job.live(rank, wait=number % 2 == 0, **crash)
    check_found(life, reference)
    assert life.ended[rank].returncode == -signal.SIGKILL, f"it never came to the crash point: {life.ended[rank].stderr}"
    job.end(reference, at_least=life.durable)


# What a state has only if this library has saved the parts of its ranks.
OURS = {
    "fsdp2": {"optimizer_0/manifest.json"},
    "fsdp2-by-rank": {f"{part}_0_rank{rank}.bin" for part in ("optimizer", "pytorch_model_fsdp") for rank in range(2)},
    "deepspeed": {"pytorch_model/manifest.json"},
}


def ours_in(checkpoint: Path) -> set[str]:
    """Files that its manifest lists, and manifests of its parts."""
    listed = {file["name"] for file in json.loads((checkpoint / "manifest.json").read_text())["files"]}
    return listed | {str(path.relative_to(checkpoint)) for path in checkpoint.glob("*/manifest.json")}


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2-by-rank", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_sharded_states_are_killed_and_resumed(
    kind: str, nurseries: list[Nursery], references: References, tmp_path: Path
) -> None:
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    job, reference = Job(nurseries, tmp_path, kind=kind), references.of(2, kind=kind)
    life = job.live(1, wait=True, crash_point="data-durable", crash_skip=9, crash_rank=1)
    check_found(life, reference)
    assert life.ended[1].returncode == -signal.SIGKILL, f"it never came to the crash point: {life.ended[1].stderr}"
    assert life.durable > 0
    job.end(reference, at_least=life.durable)
    for checkpoint in (job.directory / "checkpoints").iterdir():
        assert OURS[kind] <= ours_in(checkpoint), "it was left to others to save it"


def test_only_the_main_process_saves(nurseries: list[Nursery], references: References, tmp_path: Path) -> None:
    """As scripts do: under `if accelerator.is_main_process`."""
    job = Job(nurseries, tmp_path, ranks="main", numbered=False)
    outcomes = job.whole()
    for outcome, expected in zip(outcomes, references.of(2), strict=True):
        assert outcome["digests"] == expected["digests"]
    assert sorted(path.name for path in job.directory.iterdir() if path.is_dir()) == [f"step_{n}" for n in range(1, STEPS + 1)]
    again = job.whole(load=str(job.directory / "step_4"), steps=4)
    digest_of_rank_0 = again[0]["digests"]["4"]
    assert digest_of_rank_0 == outcomes[0]["digests"]["4"]


def test_what_the_main_process_cannot_load_all_are_told(nurseries: list[Nursery], tmp_path: Path) -> None:
    job = Job(nurseries, tmp_path, "accelerate_refusal")
    job.directory.mkdir()
    (job.directory / "checkpoints").touch()
    (main, text), (other, text_there) = (outcome["told"] for outcome in job.whole())
    assert (main, other) == ("NotADirectoryError", "CheckpointError")
    assert text in text_there


def test_files_of_each_rank_hold_what_accelerate_writes_there(nurseries: list[Nursery], tmp_path: Path) -> None:
    """Bit for bit, and hardly anything of it is copied while the training waits."""
    for outcome in Job(nurseries, tmp_path, "accelerate_by_rank").whole():
        assert outcome["names"] == outcome["stock_names"] and outcome["digests"] == outcome["stock_digests"]
        assert outcome["bytes_copied"] < outcome["bytes"] / 4


KINDS = ("plain", "fsdp2", "fsdp2-by-rank", "fsdp2-full", pytest.param("deepspeed", marks=pytest.mark.slow))


@pytest.mark.parametrize("kind", KINDS)
def test_each_goes_on_from_what_the_other_has_saved(
    kind: str, nurseries: list[Nursery], references: References, tmp_path: Path
) -> None:
    """Two ranks: accelerate alone and this library, in turn, in one directory."""
    plan = {} if kind == "plain" else {"kind": kind}
    job, reference = Job(nurseries, tmp_path, **plan), references.of(2, **plan)
    for steps, stock in ((2, False), (4, True), (6, False), (STEPS, True)):
        for outcome, expected in zip(job.whole(steps=steps, stock=stock), reference, strict=True):
            assert outcome["digests"].items() <= expected["digests"].items()
            assert min(map(int, outcome["digests"])) == max(0, steps - 2)
