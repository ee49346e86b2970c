"""A hundred checkpoints that share blocks: whichever go, stock readers find each of the others whole, on the disk itself."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mounting import MIB
from reuse_runs import KINDS, sharing, sync  # noqa: F401  sharing is a fixture
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.dcp import DcpCheckpointer


def state_at(step: int) -> dict[str, Any]:
    """Of which a tensor never changes, one does in every tenth step, and one always."""
    generator = torch.Generator().manual_seed(5)
    return {
        "frozen": torch.randn(MIB // 2, generator=generator),
        "slow": torch.randn(MIB // 4 + 100, generator=generator) + step // 10,
        "learning": torch.full((10_000,), float(step)),
    }


def flat(directory: Path, count: int) -> dict[int, Path]:
    with ckpt.Checkpointer(directory, keep=None, options=options(refresh_every=20)) as checkpointer:
        return save_all(count, lambda step: checkpointer.save(step, state_at(step)))


def save_all(count: int, save: Callable[[int], ckpt.PendingSave]) -> dict[int, Path]:
    places, reused = {}, []
    for step in range(count):
        pending = save(step)
        places[step] = pending.result(DEADLINE_S)
        reused.append(pending.stats.reused_bytes)
    assert sum(each > 2 * MIB for each in reused) > count // 2
    return places


def read_flat(step: int, place: Path) -> None:
    assert_same(state_at(step), torch.load(place / "state.pt"))
    with zipfile.ZipFile(place / "state.pt") as archive:
        assert archive.testzip() is None


def sharded(directory: Path, count: int) -> dict[int, Path]:
    with DcpCheckpointer(options=options(refresh_every=20), alone=True) as saver:
        return save_all(count, lambda step: saver.save(directory / f"checkpoint-{step}", state_at(step)))


def read_sharded(step: int, place: Path) -> None:
    found = {key: torch.zeros_like(value) for key, value in state_at(step).items()}
    torch.distributed.checkpoint.load(found, checkpoint_id=place, no_dist=True)
    assert_same(state_at(step), found)


def read_all(disk: Path, places: dict[int, Path], read: Callable[[int, Path], None]) -> None:
    """What is in memory is not believed."""
    sync(disk)
    for step, place in places.items():
        for file in place.iterdir():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read(step, place)


def order_of(kind: str, steps: list[int]) -> list[int]:
    """In which they go."""
    if kind == "by chance":
        random.Random(4).shuffle(steps)
    return steps[::-1] if kind == "newest first" else steps


def lose_all_but_one(disk: Path, make: Any, read: Any, count: int, order: str, every: int) -> None:
    places = make(disk / "run", count)
    read_all(disk, places, read)
    for number, step in enumerate(order_of(order, list(places))[:-1], 1):
        shutil.rmtree(places.pop(step))
        if number % every == 0 or len(places) < 4:
            read_all(disk, places, read)
    assert len(places) == 1


FORMATS = pytest.mark.parametrize(("make", "read"), [(flat, read_flat), (sharded, read_sharded)], ids=["flat", "sharded"])


@FORMATS
def test_twelve(sharing: Path, make: Any, read: Any) -> None:  # noqa: F811
    lose_all_but_one(sharing, make, read, 12, "by chance", 12)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["oldest first", "newest first", "by chance"])
@FORMATS
@pytest.mark.parametrize("sharing", KINDS, indirect=True)
def test_a_hundred(sharing: Path, make: Any, read: Any, order: str) -> None:  # noqa: F811
    lose_all_but_one(sharing, make, read, 100, order, 20)
