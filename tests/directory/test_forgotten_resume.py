"""A job that forgets to look at the checkpoints that are there neither replaces nor removes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options
from test_ranks_apart import Pair
from test_retention import save, state

import ckpt
from ckpt.errors import CheckpointError, CorruptError, PeerError
from ckpt.integrations.torch import CheckpointCallback

REFUSED = r"step {} was not saved: '.*' holds checkpoints that .*newest of step {}.*restore\(\).*resume\(\).*another directory"


def make(directory: Path, keep: int | None = 3) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, keep=keep, options=options())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path, native: Any) -> Path:
    """Steps 28, 29 and 30."""
    with make(tmp_path) as checkpointer:
        save(checkpointer, *range(26, 31))
    return tmp_path


@pytest.mark.parametrize("step", [1, 29, 30])
@pytest.mark.parametrize("keep", [3, None])
def test_it_is_refused(keep: int | None, step: int, saved: Path) -> None:
    before = contents(saved)
    with make(saved, keep) as checkpointer:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=REFUSED.format(step, 30)):
                save(checkpointer, step)
        assert contents(saved) == before
        found = checkpointer.restore()  # the remedy
        assert found is not None and found.step == 30
        save(checkpointer, step)
        found = checkpointer.restore()
        assert found is not None and found.step == step
        assert_same(state(step), found.state)


def test_the_callback_too(saved: Path) -> None:
    before = contents(saved)
    with (
        CheckpointCallback(saved, model=torch.nn.Linear(2, 2), options=options()) as callback,
        pytest.raises(CheckpointError, match=REFUSED.format(1, 30)),
    ):
        callback.step(1)
    assert contents(saved) == before


def test_on_all_ranks(tmp_path: Path, native: Any) -> None:
    first = Pair(tmp_path)
    assert first.save_both(5) == [None, None]
    first.close()
    before = contents(tmp_path)
    pair = Pair(tmp_path)
    try:
        errors = pair.save_both(1)
        assert type(errors[0]) is CheckpointError and "holds checkpoints that" in str(errors[0])
        assert isinstance(errors[1], PeerError) and "rank 0 may not save: step 1 was not saved" in str(errors[1])
        assert contents(tmp_path) == before
        assert [found.step for found in pair.restore_both()] == [5, 5]
        assert pair.save_both(1) == [None, None]
    finally:
        pair.close()


def test_steps_above_the_newest_are_saved(saved: Path) -> None:
    """By a program that loads files of its own choice."""
    with make(saved) as checkpointer:
        save(checkpointer, 31, 2)
        assert checkpointer.steps() == [2, 30, 31]


def test_the_newest_is_the_one_that_was_committed_last(saved: Path) -> None:
    with make(saved) as checkpointer:
        checkpointer.restore()
        save(checkpointer, 7)
    with make(saved) as checkpointer:
        save(checkpointer, 8)
        assert checkpointer.steps() == [7, 8, 30]


def test_who_has_looked_knows_what_it_does(saved: Path) -> None:
    """Whatever came of it."""
    for path in saved.glob("step-*/state.pt"):
        path.write_bytes(b"damaged")
    with make(saved) as checkpointer:
        with pytest.raises(CorruptError):
            checkpointer.restore()
        save(checkpointer, 1)


def test_what_came_after_the_look_was_not_seen(tmp_path: Path, native: Any) -> None:
    with make(tmp_path) as early, make(tmp_path) as other:
        assert early.restore() is None
        save(other, 1, 2, 3)
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=REFUSED.format(1, 3)):
            save(early, 1)
        assert contents(tmp_path) == before
        save(other, 4)  # nothing was taken from this one


def test_who_was_refused_keeps_nobody_out(saved: Path) -> None:
    with make(saved) as refused, make(saved) as other:
        with pytest.raises(CheckpointError, match="was not saved"):
            save(refused, 1)
        save(other, 31)
        refused.restore()
        save(refused, 32)
        assert other.steps() == [30, 31, 32]


def test_a_restore_makes_no_directory(tmp_path: Path, native: Any) -> None:
    """Its name may be mistyped. The first save makes it, for the ranks of a job, too."""
    typo = tmp_path / "nowhere" / "typo"
    with make(typo) as checkpointer:
        for exclusive in (False, True):
            assert checkpointer.restore(exclusive=exclusive) is None
        assert checkpointer.steps() == []
    with CheckpointCallback(typo, model=torch.nn.Linear(2, 2), options=options()) as callback:
        callback.resume()
    pair = Pair(typo)
    assert pair.restore_both() == [None, None]
    assert list(tmp_path.iterdir()) == []
    assert pair.save_both(1) == [None, None]
    with make(typo) as checkpointer:
        assert checkpointer.steps() == [1]
    pair.close()
