"""A node gives up, or is silent: who waits on other nodes is told so, and if it delivers after all, that is taken back."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest
from drain_points import FAILURE_POINTS
from node_roots import Drain, Job, MiB, crash_at, drain_once, drain_well, fault, this_process, wait_for

from ckpt.drain.journal import Journal

pytestmark = pytest.mark.usefixtures("native")


def blocked(job: Job, sequence: int = 1, node: int = 0) -> Journal | None:
    """Its journal, if it waits for others no more."""
    journal = job.journal(sequence, node)
    return journal if journal is not None and journal.state == "failed" and journal.next is None else None


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_node_that_gives_up_is_named_on_the_others(code: int, first: int, tmp_path: Path) -> None:
    """Whichever node comes first. When it has delivered after all, the checkpoint is home, and all say so."""
    job = Job(tmp_path, nodes=2)
    job.save(1, size=MiB, common=4 * MiB)
    refused = fault("open", code, "/rank-00001.pt.part")
    for node in (first, 1 - first):
        ended = drain_once(job.roots[node], prepare=refused if node == 1 else "pass")
    drain_once(job.roots[0])
    journal = blocked(job)
    assert journal is not None and journal.errno == code, ended.stderr
    assert "node 1 (" in journal.text and "has given up its part" in journal.text and "rank-00001.pt" in journal.text
    assert job.steps_at_home() == []
    drain_well(job.roots[1])
    assert job.steps_at_home() == [1] and job.state(1, 1) == "committed"
    drain_well(job.roots[0])
    journal = job.journal(1)
    assert journal is not None and (journal.state, journal.text, journal.errno) == ("committed", "", 0)
    job.assert_home_is_right()
    job.assert_home_is_tidy()


@pytest.mark.parametrize("point", FAILURE_POINTS)
def test_a_node_is_killed_while_it_gives_up(point: str, tmp_path: Path) -> None:
    """It delivers as if nothing had been."""
    job = Job(tmp_path, nodes=2)
    job.save(1, size=MiB)
    drain_well(job.roots[0])
    refused = fault("open", errno.EROFS, "/rank-00001.pt.part")
    assert drain_once(job.roots[1], prepare=f"{refused}; {crash_at(point)}").returncode == -signal.SIGKILL
    for root in (*job.roots, job.roots[0]):
        drain_once(root)
    assert job.state(1) == job.state(1, 1) == "committed"
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_a_drain_that_lives_takes_it_back_by_itself(tmp_path: Path) -> None:
    """As soon as the other one begins again."""
    job = Job(tmp_path, nodes=2, pids=this_process())
    job.save(1, size=MiB)
    job.describe(1)  # nobody trains there any more
    assert drain_once(job.roots[1], prepare=fault("open", errno.EROFS, "/rank-00001.pt.part")).returncode == 5
    with Drain(job.roots[0], []) as drain:
        wait_for(lambda: blocked(job) is not None, drain)
        drain_well(job.roots[1])
        wait_for(lambda: job.state(1) == "committed", drain)
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_files_that_are_gone_are_told_of(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    job.save(1)
    drain_well(job.roots[0])
    for path in job.roots[1].glob("step-*/rank-*"):
        path.unlink()
    assert drain_once(job.roots[1]).returncode == 5
    assert drain_once(job.roots[0]).returncode == 5
    journal = blocked(job)
    assert journal is not None and "node 1 (" in journal.text and "is gone" in journal.text


def test_a_node_that_can_say_nothing_is_waited_for_so_long(tmp_path: Path) -> None:
    """Home cannot be written to from there at all. Once it can, all is well."""
    job = Job(tmp_path, nodes=2, pids=this_process())
    job.save(1, size=MiB)
    job.describe(1)
    nothing = "; ".join(fault(call, errno.EROFS, "/home/", count=-1) for call in ("open", "mkdir", "rename", "write"))
    assert drain_once(job.roots[1], prepare=nothing).returncode == 5
    with Drain(job.roots[0], [], "from ckpt.drain import others; others._SILENCE_S = 0.2") as drain:
        wait_for(lambda: blocked(job) is not None, drain)
        journal = blocked(job)
        assert journal is not None and journal.errno == errno.ETIMEDOUT and "node 1 has not delivered" in journal.text
        assert job.state(1, 1) == "failed"
        drain_well(job.roots[1])
        wait_for(lambda: job.state(1) == "committed", drain)
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_who_delivers_is_not_silent(tmp_path: Path) -> None:
    """However long it takes, and whichever generation it is of; what this node writes itself is no sign."""
    from ckpt.directory.node_place import NodePlace
    from ckpt.drain import others

    now, place, long = 0.0, NodePlace(0, 2, (0,)), 10 * others._SILENCE_S
    inbox = tmp_path / "000000000002"
    inbox.mkdir()
    (tmp_path / "node-0001.json").write_text("an address")
    silence = others.Silence(tmp_path, clock=lambda: now)
    for size in range(1, 5):
        now += 0.7 * others._SILENCE_S
        (inbox / "rank-00001.pt.part").write_bytes(bytes(size))
        assert silence.failure(place, [1], long) is None
    now += 0.7 * others._SILENCE_S
    newer = tmp_path / "000000000003"
    newer.mkdir()
    own = ("rank-00000.pt", "__0_0.distcp.part", "inbox.json", "plan.json", "replicated.pt.part", "receipt-node-0000.json")
    for name in own:
        (newer / name).write_bytes(b"of this node")
    assert silence.failure(place, [1], long) is None
    now += 0.7 * others._SILENCE_S
    assert silence.failure(place, [1], 1.0) is None, "this node has just delivered, and before there was nothing to do"
    failure = silence.failure(place, [1], long)
    assert failure is not None and failure.errno == errno.ETIMEDOUT
    for name in ("receipt-node-0001.json", "__1_0.distcp.part", "replicated.pt.part"):
        (newer / name).write_bytes(b"of the other one")
        now += 0.7 * others._SILENCE_S
        assert silence.failure(place, [1], long) is None, name


def test_a_node_that_is_silent_does_not_let_others_fill_home(tmp_path: Path) -> None:
    """Nor their own disks, although the job saves on. Once it is back, something comes home at once."""
    job = Job(tmp_path, nodes=2)
    for step in range(1, 9):
        job.save(step)
        drain_once(job.roots[0])
    assert len(list((job.home / ".drain" / "run-1").glob("0*"))) <= 3
    assert len(job.steps_on(0)) <= 6
    drain_well(job.roots[1])
    assert job.steps_at_home() == [3], "what both nodes have"
    for root in (*job.roots, *job.roots):
        drain_well(root)
    assert job.steps_at_home()[-1] == 8
    job.assert_home_is_right()
    job.assert_home_is_tidy()
