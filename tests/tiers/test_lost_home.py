"""Home was removed, or is not mounted, and the nodes hold what was there: no job begins anew unawares."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_roots import drain_well
from support import DEADLINE_S
from test_node_level import checkpointer, restored, state
from test_node_saves import end_drains

import ckpt
from ckpt.errors import CheckpointError, NotACheckpointError

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Which is gone; step 2 was there, and lies on the node."""
    home = tmp_path / "home"
    with checkpointer(home) as made:
        for step in (1, 2):
            made.save(step, state(step)).result(DEADLINE_S)
    end_drains(tmp_path)
    shutil.rmtree(home)
    yield home
    end_drains(tmp_path)


def root_of(home: Path) -> Path:
    (root,) = home.parent.glob("node-0/*")
    return root


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_it_is_said_and_nothing_begins(home: Path, fresh: bool, there: bool) -> None:
    """Also if its directory is there: where nothing is mounted there is one."""
    if there:
        home.mkdir()
    with checkpointer(home) as made:
        with pytest.raises(NotACheckpointError) as raised:
            made.restore(fresh=fresh)
        for part in (f"'{home}' names no run", f"'{root_of(home)}'", "newest step 2", "--rebuild", "to begin anew, remove"):
            assert part in str(raised.value)
        with pytest.raises(CheckpointError, match=r"nothing was saved: .* names no run"):
            made.save(3, state(3))
    assert not (home / ".run").exists()


def test_it_comes_back(home: Path) -> None:
    root = root_of(home)
    drain_well(root, "--rebuild")
    with checkpointer(home) as made:
        assert restored(made) == (2, 2)
        made.save(3, state(3)).result(DEADLINE_S)
    assert root_of(home) == root, "of the same run"


def test_who_wants_to_begins_anew(home: Path) -> None:
    shutil.rmtree(root_of(home))
    with checkpointer(home) as made:
        assert made.restore() is None
        made.save(0, state(7)).result(DEADLINE_S)
        assert restored(made) == (0, 7)


def test_what_is_at_home_counts_and_the_rest_is_told_of(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As brought back from a backup, without the name of the run."""
    with ckpt.Checkpointer(home) as made:
        made.save(1, state(5)).result(DEADLINE_S)
    with checkpointer(home) as made:
        assert restored(made) == (1, 5)
        assert "what the nodes have is left out" in caplog.text and "newest step 2" in caplog.text


def test_the_runs_of_others_are_no_reason(home: Path) -> None:
    """They share the disk."""
    other = home.with_name("other")
    with checkpointer(other) as made:
        assert made.restore() is None
        made.save(0, state(1)).result(DEADLINE_S)
