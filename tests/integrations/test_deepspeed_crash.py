"""A rank of a DeepSpeed job is killed at every point of a save; the job resumes and ends where the undisturbed one ends."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from choice import in_turn, mostly_slow
from dist.deepspeed_nursery import DeepSpeedNursery, free_port, training_program
from nursery import Child, Ended, Nursery, nurseries_of_ranks

pytestmark = pytest.mark.usefixtures("native")

ENGINE = "enable"
STEPS, MANY_STEPS = 6, 60
DETECTED_S = 0.3  # the ranks that are left go on for so long, as under a launcher, before it ends them

# Where a rank can be killed while a tag is saved.
EVERY_RANK = ("preallocated", "chunk-written", "data-durable", "prepared", "placed")
RANK_0_ONLY = ("manifest-written", "manifest-renamed", "published", "all-placed", "latest-written", "latest-renamed")
TRAINING = ("deepspeed-stepped",)  # right after a step, with a save on its way
TAG_POINTS = [(point, rank) for point in (*TRAINING, *EVERY_RANK) for rank in (0, 1)] + [(point, 0) for point in RANK_0_ONLY]

KINDS: list[dict[str, Any]] = [
    {"stage": 1, "precision": "bf16"},
    {"stage": 3, "precision": "fp32"},
    {"variant": "pipeline", "stage": 1, "precision": "bf16"},
    {"variant": "moe", "stage": 2, "precision": "fp32", "expert_ranks": 2},
    {"stage": 0, "precision": "fp16"},
]


@dataclasses.dataclass
class Life:
    """What the ranks of a job said and left, from its start to its end or to when it was killed."""

    ended: list[Ended]
    outcomes: list[dict[str, Any] | None]

    @property
    def found(self) -> list[dict[int, str]]:
        """For each rank the digest of the state in which it began, by its step; nothing if it did not come so far."""
        return [{int(step): digest for step, digest in self._said(rank, r"found (\d+) (\w+)")} for rank in self.ended]

    @property
    def durable(self) -> int:
        """The newest step that any rank has called durable; 0: none."""
        return max((int(step) for rank in self.ended for step in self._said(rank, r"durable (\d+)")), default=0)

    @staticmethod
    def _said(rank: Ended, pattern: str) -> list[Any]:
        return re.findall(f"^{pattern}$", rank.stdout, re.MULTILINE)


class Job:
    """Two ranks that train in one directory, again and again."""

    def __init__(self, nurseries: list[Nursery], where: Path, kind: dict[str, Any]) -> None:
        self._nurseries, self._where, self._kind = nurseries, where, kind
        self._lives = 0

    def start(self, **more: Any) -> tuple[Path, list[Child]]:
        self._lives += 1
        outcomes = self._where / f"life-{self._lives}"
        outcomes.mkdir()
        common = {"mode": "train", "engine": ENGINE, "steps": STEPS, "same_buffers": True}
        case = common | {"name": "case", "directory": str(self._where / "saved")} | self._kind | more
        plan = {"outcomes": str(outcomes), "cases": [case]}
        port = free_port()
        return outcomes, [nursery.start(training_program(plan, rank, 2, port)) for rank, nursery in enumerate(self._nurseries)]

    def live(self, first: int = 0, kill_after_s: float | None = None, **more: Any) -> Life:
        """Until the end, or until rank `first` has been killed, by itself or after so long, and the other soon after."""
        outcomes, children = self.start(**more)
        ended: dict[int, Ended] = {}
        for rank in sorted(range(len(children)), key=lambda rank: rank != first):
            if kill_after_s is not None and not ended:
                children[rank].kill_after(kill_after_s)
            if any(before.returncode for before in ended.values()):
                children[rank].kill_after(DETECTED_S)
            ended[rank] = children[rank].wait()
        paths = [outcomes / f"case.{rank}.json" for rank in range(len(children))]
        read = [json.loads(path.read_text()) if path.exists() else None for path in paths]
        return Life([ended[rank] for rank in range(len(children))], read)

    def end(self, reference: list[dict[str, Any]], at_least: int, **more: Any) -> int:
        """Resumes from what was saved last, computes the same, and leaves no rubbish; the step it resumed from."""
        life = self.live(**more)
        assert [rank.returncode for rank in life.ended] == [0, 0], life.ended[0].stderr + life.ended[1].stderr
        for outcome, expected in zip(life.outcomes, reference, strict=True):
            assert outcome is not None and "error" not in outcome, outcome
            for name in ("digests", "losses"):
                assert outcome[name].items() <= expected[name].items(), f"a resumed run has other {name}"
            assert str(more.get("steps", STEPS)) in outcome["digests"]
        found = {step for rank in life.found for step in rank}
        assert len(found) == 1 and min(found) >= at_least, f"resumed from {found}, not from {at_least} or later"
        assert not list((self._where / "saved").rglob(".tmp-*"))
        return min(found)


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2, DeepSpeedNursery) as made:
        yield made


class References:
    """What each rank of the undisturbed run computes, for each kind and number of steps, as far as asked for."""

    def __init__(self, nurseries: list[Nursery], where: Path) -> None:
        self._nurseries, self._where = nurseries, where
        self._known: dict[str, list[dict[str, Any]]] = {}

    def of(self, kind: int, **more: Any) -> list[dict[str, Any]]:
        name = f"{kind}-{more}"
        if name not in self._known:
            where = self._where / str(len(self._known))
            where.mkdir()
            life = Job(self._nurseries, where, KINDS[kind]).live(**more)
            assert [rank.returncode for rank in life.ended] == [0, 0], life.ended[0].stderr + life.ended[1].stderr
            outcomes = [outcome for outcome in life.outcomes if outcome is not None and "error" not in outcome]
            assert len(outcomes) == 2, life.outcomes
            self._known[name] = outcomes
        return self._known[name]


@pytest.fixture(scope="module")
def references(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(nurseries, tmp_path_factory.mktemp("references"))


def check_found(life: Life, reference: list[dict[str, Any]]) -> None:
    """What a rank has resumed from is what the undisturbed run was in."""
    for found, expected in zip(life.found, reference, strict=True):
        assert {str(step): digest for step, digest in found.items()}.items() <= expected["digests"].items()


# Of each kind that commits anew some; the points are those of any other save, where all are run: tests/commit/test_commit.py.
MANY_TAG_POINTS = [*in_turn([*TRAINING, *EVERY_RANK]), *((point, 0) for point in RANK_0_ONLY)]


@pytest.mark.parametrize(("point", "rank"), mostly_slow(TAG_POINTS, run=MANY_TAG_POINTS))
def test_killed_at_a_crash_point(
    point: str, rank: int, nurseries: list[Nursery], references: References, tmp_path: Path
) -> None:
    number = TAG_POINTS.index((point, rank))
    kind, wait = number % len(KINDS), number % 2 == 0
    job, reference = Job(nurseries, tmp_path, KINDS[kind]), references.of(kind)
    life = job.live(rank, crash_point=point, crash_skip=number % 3, crash_rank=rank, wait=wait)
    check_found(life, reference)
    assert life.ended[rank].returncode == -signal.SIGKILL, "it never came to the crash point"
    job.end(reference, at_least=life.durable)


AGAIN_POINTS = [(point,) for point in (*EVERY_RANK[2:], *RANK_0_ONLY)]


@pytest.mark.parametrize(("point",), mostly_slow(AGAIN_POINTS, run=AGAIN_POINTS[::2]))
def test_killed_while_a_tag_is_saved_again(
    point: str, nurseries: list[Nursery], references: References, tmp_path: Path
) -> None:
    """The tag is there, old or new, never a mixture."""
    job, reference = Job(nurseries, tmp_path, KINDS[0]), references.of(0, one_tag=True)
    life = job.live(crash_point=point, crash_skip=3, wait=True, one_tag=True)
    check_found(life, reference)
    assert life.ended[0].returncode == -signal.SIGKILL, "it never came to the crash point"
    job.end(reference, at_least=max(life.durable, 1), one_tag=True)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, 200])
def test_killed_at_any_moment(kills: int, nurseries: list[Nursery], references: References, tmp_path: Path) -> None:
    """One run, killed and resumed over and over in the same directory."""
    moments = random.Random(20240608)
    job, reference, step = Job(nurseries, tmp_path, KINDS[0]), references.of(0, steps=MANY_STEPS), 0
    for _ in range(kills):
        kill_after_s, wait = moments.uniform(0.3, 1.5), moments.random() < 0.5
        life = job.live(moments.randrange(2), kill_after_s, wait=wait, steps=MANY_STEPS)
        check_found(life, reference)
        found = [at for rank in life.found for at in rank]
        assert min(found, default=step) >= step, "a kill took the run back"
        step = max([step, life.durable, *found])
    job.end(reference, at_least=step, steps=MANY_STEPS)
