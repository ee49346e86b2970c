"""restore() of ranks that read the replicated file together. Real processes, gloo over loopback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_shared_read import Ranks

WAYS = ["fresh", "into", "lent"]
SIZE = 12 << 20  # of the replicated file, almost


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


@pytest.fixture
def saved(ranks: Ranks, tmp_path: Path) -> Path:
    """A directory with steps 0 and 1."""
    assert ranks.ask("save_steps", directory=str(tmp_path), steps=2) == [{}, {}, {}]
    return tmp_path


def newest(saved: Path, name: str) -> Path:
    return saved / "step-000000000001" / name


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def steps(answers: list[dict[str, Any]]) -> list[Any]:
    return [answer.get("step", answer) for answer in answers]


@pytest.mark.parametrize("way", [*WAYS, "askew"])
def test_each_rank_reads_its_share(ranks: Ranks, saved: Path, way: str) -> None:
    alone = ranks.ask("restore", directory=str(saved), way=way, readers="each")
    together = ranks.ask("restore", directory=str(saved), way=way)
    assert steps(alone) == steps(together) == [1, 1, 1]
    assert min(answer["bytes_read"] for answer in alone) > SIZE
    assert max(answer["bytes_read"] for answer in together) < SIZE * 0.6, "a third, and 1.2 MB of its own"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["replicated.pt", "rank-00000.pt", "rank-00002.pt", "manifest.json"])
@pytest.mark.parametrize("where", ["begin", "middle", "end"])
def test_a_damaged_checkpoint_is_passed_over(ranks: Ranks, saved: Path, name: str, where: str, way: str) -> None:
    path = newest(saved, name)
    size = path.stat().st_size
    flip(path, {"begin": 0, "middle": size // 2, "end": size - 30}[where])
    assert steps(ranks.ask("restore", directory=str(saved), way=way)) == [0, 0, 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("skip", [0, 1, 3, 6, *(pytest.param(skip, marks=pytest.mark.slow) for skip in (2, 4, 5, 7))])
def test_a_rank_that_cannot_read(ranks: Ranks, saved: Path, way: str, skip: int) -> None:
    """All of them pass the checkpoint over, whatever it was that the one could not read."""
    fault = {"call": "pread", "error": errno.EIO, "skip": skip, "count": 1}
    answers = ranks.ask("restore", directory=str(saved), way=way, only={1: {"fault": fault}})
    assert steps(answers) in ([0, 0, 0], [1, 1, 1])  # 1: so many reads it did not need
    assert skip > 1 or steps(answers) == [0, 0, 0]


@pytest.mark.parametrize("rank", range(3))
def test_a_target_that_does_not_fit(ranks: Ranks, saved: Path, rank: int) -> None:
    """Is this rank's mistake; the others hear of it, and nobody hangs."""
    answers = ranks.ask("restore", directory=str(saved), way="into", only={rank: {"misfit": True}})
    assert [answer["error"] for answer in answers] == ["MismatchError" if each == rank else "PeerError" for each in range(3)]
    assert all(f"rank {rank}" in answer["text"] for each, answer in enumerate(answers) if each != rank)
    assert all("weights" in answer["text"] for answer in answers)
    assert steps(ranks.ask("restore", directory=str(saved), way="into")) == [1, 1, 1]


def test_ranks_that_lend_different_memory(ranks: Ranks, saved: Path) -> None:
    answers = ranks.ask("restore", directory=str(saved), way="fresh", only={2: {"way": "lent"}})
    assert steps(answers) == [1, 1, 1] or {answer["error"] for answer in answers} == {"CheckpointError"}
    assert steps(ranks.ask("restore", directory=str(saved))) == [1, 1, 1]
