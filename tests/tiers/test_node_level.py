"""One process and the disk of its node: numbers, room, failures, several lines of one run."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from node_roots import drain_well, wait_for
from support import DEADLINE_S, options
from test_node_saves import end_drains

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.errors import SkippedError
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.tiers.drain_process import DrainProcess

pytestmark = pytest.mark.usefixtures("native")
SLOW = 20_000  # bytes a second: nothing comes home within a test


def state(value: int) -> dict[str, Any]:
    return {"value": value, "data": torch.full((5_000,), value)}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    end_drains(tmp_path)


def node(home: Path, number: int = 0) -> Path:
    return home.with_name(f"node-{number}")


@contextlib.contextmanager
def checkpointer(home: Path, number: int = 0, **tier: Any) -> Iterator[ckpt.Checkpointer]:
    """Which leaves what is not home yet to the drain."""
    made = ckpt.Checkpointer(
        home, keep=None, options=options(drain_timeout_s=0.1), tiers=[ckpt.Tier.node(node(home, number), **tier)]
    )
    try:
        yield made
    finally:
        with contextlib.suppress(ckpt.CheckpointError):
            made.close()


def land(checkpointer: ckpt.Checkpointer, step: int, value: int) -> Path:
    return checkpointer.save(step, state(value)).on_tier("node").result(DEADLINE_S)


def restored(checkpointer: ckpt.Checkpointer) -> tuple[int, int]:
    found = checkpointer.restore()
    assert found is not None and torch.equal(found.state["data"], state(found.state["value"])["data"])
    return found.step, found.state["value"]


def test_a_step_is_saved_again_and_again(home: Path) -> None:
    with checkpointer(home) as made:
        for value in range(4):
            assert land(made, 1, value).is_relative_to(node(home)), "before anything has come home"
        assert made.save(2, state(9)).result(DEADLINE_S) == home / "step-000000000002"
    with checkpointer(home) as made:
        assert restored(made) == (2, 9)
        land(made, 1, 5)
    with checkpointer(home) as made:
        assert restored(made) == (1, 5), "what was committed last"


def test_it_leaves_no_thread_and_no_follower(home: Path) -> None:
    followers = importlib.import_module("ckpt.fence")._followers
    with checkpointer(home) as made:
        for step in range(3):
            made.save(step, state(step))
        made.wait(DEADLINE_S)
        assert len(followers) == 1
    assert not followers
    assert not [thread.name for thread in threading.enumerate() if thread.name == "ckpt-home-watch"]


def test_lines_that_do_not_see_each_other_never_share_a_number(home: Path) -> None:
    """The old nodes come back with what they have of a line that was given up."""
    with checkpointer(home, 0) as made:
        made.save(1, state(1)).result(DEADLINE_S)
        (lock,) = home.parent.glob("node-0/*/.drain.lock")
        os.kill(int(lock.read_text().split()[1]), signal.SIGSTOP)
        for step in range(2, 7):
            land(made, step, step)
    end_drains(home.parent)
    with checkpointer(home, 1) as made:
        assert restored(made) == (1, 1), "nothing else has come home"
        for step in (2, 3):
            made.save(step, state(100 + step)).result(DEADLINE_S)
    newest = manifests.read(home / "step-000000000003").sequence
    with checkpointer(home, 0) as made:
        assert restored(made) == (3, 103), "not what its own node has of the line that was given up"
    there = [manifests.read(path.parent) for path in node(home, 0).glob("*/step-*/manifest.json")]
    assert there and max(manifest.sequence for manifest in there) < newest


def test_a_job_that_forgets_to_resume_is_refused(home: Path) -> None:
    """Also if all that there is lies on its node."""
    with checkpointer(home, rate=SLOW) as made:
        land(made, 5, 5)
    with checkpointer(home, rate=SLOW) as made:
        with pytest.raises(ckpt.CheckpointError, match="not looked at"):
            made.save(1, state(1))
        assert restored(made) == (5, 5)
        assert land(made, 1, 1).is_relative_to(node(home))


def test_a_disk_that_another_process_has_locked_is_left_alone(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with checkpointer(home) as made:
        made.save(1, state(1)).result(DEADLINE_S)
        made.save(1, state(11)).result(DEADLINE_S)
    (root,) = node(home).iterdir()
    lock = DirectoryLock(root)
    lock.acquire()
    try:
        with checkpointer(home) as made:
            assert restored(made) == (1, 11)
            for step in (1, 2):
                assert made.save(step, state(step)).on_tier("node").result(DEADLINE_S).is_relative_to(home)
    finally:
        lock.release()
    assert "cannot be used" in caplog.text
    with checkpointer(home) as made:
        assert restored(made) == (2, 2)


def test_a_disk_that_goes_away_is_passed_by(home: Path) -> None:
    with checkpointer(home) as made:
        made.save(1, state(1)).result(DEADLINE_S)
        shutil.rmtree(node(home))
        node(home).write_bytes(b"no directory")
        outcomes = [made.save(step, state(step)).exception(DEADLINE_S) for step in range(2, 9)]
        assert outcomes.count(None) >= 3, "but for those that were begun before the ranks knew, and what tries the disk again"
        assert restored(made)[0] >= 5
    node(home).unlink()


def test_a_full_disk_skips_saves_where_the_tier_says_so(home: Path) -> None:
    with checkpointer(home, max_bytes=150_000, when_full="skip", rate=SLOW) as made:
        outcomes = [made.save(step, state(step)).on_tier("node").exception(DEADLINE_S) for step in range(6)]
    skipped = [step for step, outcome in enumerate(outcomes) if isinstance(outcome, SkippedError)]
    assert outcomes[0] is None and 5 in skipped
    assert not [step for step in skipped if (home / f"step-{step:012d}").exists()], "none goes home instead"


def test_only_some_steps_land(home: Path) -> None:
    with checkpointer(home, every=2) as made:
        landed = [land(made, step, step).is_relative_to(node(home)) for step in range(4)]
    assert landed == [True, False, True, False]


def test_a_living_job_restores_what_has_landed(home: Path) -> None:
    """Home is far behind: it is not waited for."""
    with checkpointer(home, rate=SLOW) as made:
        land(made, 1, 1)
        made.save(2, state(2))
        assert restored(made) == (2, 2)


def test_what_was_gone_back_to_stays_while_newer_ones_come_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drain that the restore starts knows what the job before has said of home, and nothing else, until a save."""

    def job() -> ckpt.Checkpointer:
        return ckpt.Checkpointer(home, keep=2, options=options(drain_timeout_s=0.1), tiers=[ckpt.Tier.node(node(home))])

    def there() -> list[int]:
        return sorted(int(path.name[5:]) for path in home.glob("step-*/") if (path / "manifest.json").exists())

    def drain(process: DrainProcess) -> str:
        drain_well(process.log.parent)
        return ""

    monkeypatch.setattr(DrainProcess, "ensure", lambda _: "")
    with contextlib.suppress(ckpt.CheckpointError), job() as made:
        for step in (2, 3, 4, 5):
            land(made, step, step)
            if step < 4:
                drain_well(next(node(home).iterdir()))
    assert there() == [2, 3]
    monkeypatch.setattr(DrainProcess, "ensure", drain)
    with job() as made:
        found = made.restore(step=2)
        assert found is not None and found.state["value"] == 2 and there() == [2, 3, 5]
        assert made.save(6, state(6)).result(DEADLINE_S) and there() == [2, 5, 6]
    assert not [*home.glob(".remote/*")], "from now on it goes as any other"


def test_what_was_gone_back_to_on_the_node_comes_home_again(home: Path) -> None:
    """Home has had it, and has tidied it since. The node removes it later, and the job goes back once more."""
    with ckpt.Checkpointer(home, keep=1, options=options(), tiers=[ckpt.Tier.node(node(home), keep=3)]) as made:
        for step in (2, 3, 4):
            made.save(step, state(step)).result(DEADLINE_S)
    with ckpt.Checkpointer(home, keep=1, options=options(), tiers=[ckpt.Tier.node(node(home), keep=3)]) as made:
        assert [path.name[-1] for path in home.glob("step-*")] == ["4"]
        for newer in ((5, 6, 7), (8,)):
            found = made.restore(step=2)
            assert found is not None and found.state["value"] == 2
            for step in newer:
                made.save(step, state(step)).result(DEADLINE_S)
        wait_for(lambda: sorted(path.name[-1] for path in home.glob("step-*/")) == ["2", "8"])


def test_failures_at_home_do_not_end_training(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "ckpt")
    home.mkdir()
    with checkpointer(home) as made:
        land(made, 0, 0)
        made.wait(DEADLINE_S)
        shutil.rmtree(home / ".drain" / (home / ".run").read_text()[9:-3], ignore_errors=True)
        (home / ".run").write_text('{"run": "another"}')
        for step in range(1, 8):
            assert land(made, step, step).is_relative_to(node(home)), "after three failures in a row as before"


def test_who_leaves_the_tier_out_is_told_so(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with checkpointer(home) as made:
        made.save(1, state(1)).result(DEADLINE_S)
    with ckpt.Checkpointer(home, options=options()) as without:
        assert restored(without) == (1, 1)
        assert caplog.text.count("is given no tiers=") == 1
        without.save(2, state(2)).result(DEADLINE_S)
    with checkpointer(home, 1) as elsewhere:
        assert restored(elsewhere) == (2, 2)
        assert "nothing of this run lies on this node" in caplog.text
