"""Steps whose frozen tensors are in a file of their own: how they come, go and are told of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from frozen_runs import FROZEN, MIB, Run, copy_of, overwritten, small_files_count  # noqa: F401  one is a fixture
from support import DEADLINE_S, assert_same, options

import ckpt

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as made:
        yield made


# ---- around it --------------------------------------------------------------------------------------------------------


def test_a_step_that_is_saved_again(run: Run) -> None:
    run.save()
    run.save()
    run.step = 0
    assert run.save() > FROZEN
    assert sorted(os.listdir(run.path(1))) == ["manifest.json", "state-2.pt", "state.frozen-2.pt"]
    assert_same(run.saved[1], ckpt.load(run.path(1)))


def test_retention_removes_links_alone(tmp_path: Path) -> None:
    with Run(tmp_path, keep=2) as run:
        for _ in range(5):
            run.save()
        run.checkpointer.wait()
        assert run.checkpointer.steps() == [3, 4]
        run.check(3, 4)
        assert os.stat(run.file(4)).st_nlink == 2


def test_a_new_process_writes_it_anew(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.save()
    with Run(tmp_path) as again:
        assert again.checkpointer.restore() is not None
        again.step, again.saved = 0, run.saved
        assert [again.save(), again.save() > FROZEN] == [0, True]
        again.check(0, 1, 2)


def test_nothing_is_kept_open_when_it_is_closed(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.save()
        run.save()
        assert str(run.file(0)) in open_files()
    assert not any(str(tmp_path) in path for path in open_files())


def open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


def test_two_parts_of_a_save(tmp_path: Path) -> None:
    """What ranks have for themselves, and what is sharded, each with a file of its own."""
    with Run(tmp_path) as run:
        for _ in range(3):
            pending = run.begin(sharded={"weights": run.frozen, "n": torch.ones(3)}, frozen=[list(run.frozen.values())])
            pending.result(DEADLINE_S)
        assert pending.stats.reused_bytes > 2 * FROZEN
        target = {"weights": copy_of(run.frozen, torch.zeros_like), "n": torch.zeros(3)}
        found = run.checkpointer.restore(sharded_into=target)
        assert found is not None
        assert_same(run.saved[2], found.state)
        assert_same(run.frozen, target["weights"])


def test_a_module_says_what_of_it_is_frozen(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 16))
    model[0].requires_grad_(False)
    setting = options(frozen="separate")
    with ckpt.Checkpointer(tmp_path / "run", options=setting) as checkpointer:
        for step in range(2):
            with torch.no_grad():
                model[1].weight.add_(1)
            checkpointer.save(step, {"model": model.state_dict()}, frozen=model).result(DEADLINE_S)
        assert list(torch.load(tmp_path / "run" / "step-000000000001" / "state.frozen.pt")) == ["model.0.weight"]
        model[0].requires_grad_(True)
        checkpointer.save(2, {"model": model.state_dict()}, frozen=model).result(DEADLINE_S)
        assert not (tmp_path / "run" / "step-000000000002" / "state.frozen.pt").exists()
        assert_same({"model": model.state_dict()}, checkpointer.restore().state)  # type: ignore[union-attr]
