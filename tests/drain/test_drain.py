"""A drain carries what is complete on a node home, as a process without torch."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from node_roots import Drain, Job, MiB, crash_at, drain_once, drain_well, fault, run_program, this_process, wait_for

import ckpt
import ckpt.drain
from ckpt.directory import manifest as manifests
from ckpt.directory.step_names import names_in, step_name
from ckpt.storage.pace_file import PaceWriter


def test_the_process_has_no_torch_and_gives_way(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1)
    check = "import atexit, os; atexit.register(lambda: os._exit(7 if 'torch' in sys.modules else os.nice(0)))"
    assert run_program(job.roots[0], "--once", prepare=check).returncode == 19
    assert job.state(1) == "committed"


def test_what_comes_home_is_restored(tmp_path: Path) -> None:
    """A real file, from the disk of a node to a Checkpointer of the home directory."""
    job, state = Job(tmp_path), {"weights": torch.arange(300_000.0), "step": 7}
    file = io.BytesIO()
    torch.save(state, file)
    saved = job.place(7, {"state.pt": file.getvalue()})
    ended = run_program(job.roots[0], "--once")
    assert ended.returncode == 0, ended.stderr
    directory = job.home / step_name(7)
    assert (directory / manifests.NAME).read_bytes() == saved.manifest.to_json()
    with ckpt.Checkpointer(job.home) as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 7
        assert torch.equal(found.state["weights"], state["weights"]) and found.state["step"] == 7
    job.assert_home_is_right()


@pytest.mark.parametrize("direct", [True, False])
def test_files_of_all_sizes(tmp_path: Path, direct: bool) -> None:
    job = Job(tmp_path, direct_io=direct)
    sizes = [0, 1, 4095, 4096, 4097, 8 * MiB - 1, 8 * MiB, 8 * MiB + 1, 20 * MiB + 5]
    for step, size in enumerate(sizes):
        job.save(step, size)
        drain_well(job.roots[0])
        assert job.state(step + 1) == "committed"
    job.assert_home_is_right()
    job.assert_home_is_tidy()
    assert job.steps_at_home() == [*range(len(sizes))] and job.steps_on() == [len(sizes) - 2, len(sizes) - 1]


def test_short_reads_and_writes_are_continued(tmp_path: Path, native: object) -> None:
    job = Job(tmp_path)
    job.save(1, 3 * MiB + 5)
    faults = "; ".join(fault(call, 0, short_bytes=700_001, count=3) for call in ("pread", "pwrite"))
    assert drain_once(job.roots[0], prepare=faults).returncode == 0
    job.assert_home_is_right()
    assert job.steps_at_home() == [1]


def test_two_nodes_deliver_and_one_of_them_commits(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    saved = job.save(1, size=3 * MiB, common=21 * MiB + 3)
    drain_well(job.roots[1])
    assert (job.state(1, 1), job.steps_at_home()) == ("copied", [])
    drain_well(job.roots[0])
    assert (job.state(1, 0), job.steps_at_home()) == ("committed", [1])
    drain_well(job.roots[1])
    assert job.state(1, 1) == "committed"
    job.assert_home_is_right()
    job.assert_home_is_tidy()
    parts = [job.journal(1, node) for node in (0, 1)]
    assert sum(part.bytes for part in parts if part) == manifests.bytes_of(saved.manifest), "each byte was copied once"
    assert all(part is not None and part.bytes == part.total > 10 * MiB for part in parts)


def test_two_nodes_that_run_side_by_side(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2, pids=this_process())
    with Drain(job.roots[0], []) as first, Drain(job.roots[1], []) as second:
        for step in range(1, 9):
            job.save(step, size=MiB, common=5 * MiB)
            wait_for(lambda: job.steps_at_home() != [], first)
        wait_for(lambda: 8 in job.steps_at_home(), second)
        wait_for(lambda: {job.state(8, node) for node in (0, 1)} == {"committed"})
        wait_for(lambda: [job.steps_on(node) for node in (0, 1)] == [[7, 8], [7, 8]])
    job.assert_home_is_right()
    job.assert_home_is_tidy()


def test_it_ends_when_nobody_trains_and_nothing_is_left(tmp_path: Path) -> None:
    job = Job(tmp_path, pids={str(os.getpid()): 1})  # another process of that number
    job.save(1)
    assert run_program(job.roots[0]).returncode == 0
    assert job.steps_at_home() == [1]


def test_a_second_one_says_who_is_at_work(tmp_path: Path) -> None:
    job = Job(tmp_path, pids=this_process())
    job.save(1)
    with Drain(job.roots[0], []) as first:
        wait_for(lambda: job.state(1) == "committed", first)
        second = run_program(job.roots[0], "--once")
        assert second.returncode == 4 and f"is being drained by process {first.pid} on " in second.stderr
        assert first.runs
    drain_well(job.roots[0])


def test_behind_a_job_its_drain_is_waited_for(tmp_path: Path) -> None:
    """As a script does that may end only when all is home."""
    job = Job(tmp_path)
    job.save(1, 12 * MiB)
    with Drain(job.roots[0], ["--rate", "4MiB/s"]) as first:
        wait_for(lambda: job.state(1) == "copying", first)
        assert drain_once(job.roots[0]).returncode == 0
        assert job.state(1) == "committed" and first.wait().returncode == 0


def test_asked_to_end_it_ends_within_a_file_and_goes_on_there(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1, 24 * MiB)
    name = "rank-00000.pt"
    part = job.home / ".drain" / "run-1" / f"{1:012d}" / f"{name}.part"
    with Drain(job.roots[0], ["--once", "--rate", "1MiB/s"]) as drain:
        wait_for(lambda: part.exists() and part.stat().st_size > 0, drain)  # the next chunk comes after 8 s
        drain.signal(signal.SIGTERM)
        assert drain.wait().returncode == 0
    before = job.journal(1)
    assert before is not None and before.state == "copying" and 0 < before.bytes < before.total
    (found,) = ckpt.drain.status(job.roots[0])
    assert (found.step, found.state, found.bytes, found.total_bytes) == (1, "copying", before.bytes, before.total)
    assert found.rate > 0
    # What lies there is not read again: it is replaced, and the file that comes home shows it.
    with part.open("r+b") as file:
        file.write(b"marked")
    drain_well(job.roots[0])
    content = job.saved[1].content[name]
    assert (job.home / step_name(1) / name).read_bytes() == b"marked" + content[6:]


def test_a_rate_holds_it_back(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1, 24 * MiB)
    drain_well(job.roots[0], "--rate", "32MiB/s")
    journal = job.journal(1)
    assert (
        journal is not None and journal.ended - journal.began >= 0.5
    )  # the first 8 MiB are free, and the last need not be waited for


def test_what_is_no_node_root_is_refused(tmp_path: Path) -> None:
    ended = drain_once(tmp_path)
    assert ended.returncode == 3 and "give the directory of one run" in ended.stderr and names_in(tmp_path) == set()
    job = Job(tmp_path)
    path = job.roots[0] / "node.json"
    path.write_bytes(path.read_bytes().replace(b'"nodes": 1', b'"nodes": 2'))
    assert "fails its own CRC-32" in drain_once(job.roots[0]).stderr


def test_status_of_all_generations(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for step in (1, 2, 3):
        job.save(step)
    drain_well(job.roots[0])
    found = [(each.sequence, each.state, each.superseded_by) for each in ckpt.drain.status(job.roots[0])]
    assert found == [(3, "committed", 0), (2, "superseded", 3), (1, "superseded", 3)]


def test_a_training_that_is_slow_or_died_in_a_capture_does_not_hold_it_up_for_good(tmp_path: Path) -> None:
    job = Job(tmp_path, rate="auto", pids=this_process())
    pace = PaceWriter(job.roots[0] / "pace")
    pace.write(1, 1.0, 1.0, False)
    job.save(1, 24 * MiB)
    with Drain(job.roots[0], []) as drain:
        wait_for(lambda: job.state(1) == "committed", drain)
        job.save(2, 24 * MiB)
        iterations = 1
        while job.state(2) != "committed":
            iterations += 1
            pace.write(iterations, 1.5, 1.0, False)
            assert drain.runs
            time.sleep(0.005)  # the drain has the lowest priority
        pace.write(iterations, 1.5, 1.0, True)
        job.save(3, 24 * MiB)
        wait_for(lambda: job.state(3) == "committed", drain)
    pace.close()
    job.assert_home_is_right()


def test_one_that_hangs_is_called_stuck(tmp_path: Path, native: object) -> None:
    job = Job(tmp_path)
    job.save(1, 16 * MiB)
    assert drain_once(job.roots[0], prepare=crash_at("drain-chunk")).returncode < 0
    (found,) = ckpt.drain.status(job.roots[0])
    assert found.state == "copying"
    os.utime(job.roots[0] / "drain" / f"{1:012d}.json", (1, 1))
    (found,) = ckpt.drain.status(job.roots[0])
    assert found.state == "stuck"
