"""Where the ranks of a bundle do not say the same: one file of several ranks, directories and names that differ."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import PYTHONPATH
from support import assert_same
from test_bundles import Job, job  # noqa: F401 - a fixture
from test_ranks_apart import IMPATIENT

from ckpt.errors import CheckpointError, PeerError, StorageError

SHARED = "expert_0_model_states.pt"
OWN = "rank_{rank}_optim_states.pt"


def replica(rank: int, value: float, **more: Any) -> dict[str, Any]:
    """The same structure on all ranks; the bytes tell whose it is."""
    return {"weights": torch.full((100_000,), value + rank), "note": "the same", **more}


def save_twins(job: Job, name: str, *states: Any) -> list[BaseException | None]:  # noqa: F811
    def act(rank: int) -> BaseException | None:
        bundle = job.ranks[rank].begin(job.roots[rank], name)
        directory = job.roots[rank] / name
        bundle.save(states[rank], directory / SHARED)
        bundle.save(replica(rank, -1.0), directory / OWN.format(rank=rank))
        return bundle.commit().exception(60)

    return job.both(act)


def assert_of_rank_0(job: Job, name: str, value: float) -> None:  # noqa: F811
    assert job.find(name) == [name, name]
    assert_same(replica(0, value), torch.load(job.roots[0] / name / SHARED))
    for rank in range(2):
        assert_same(replica(rank, -1.0), torch.load(job.roots[0] / name / OWN.format(rank=rank)))
    files = json.loads((job.roots[0] / name / "manifest.json").read_text())["files"]
    assert sorted((file["name"], file["rank"]) for file in files) == [
        (SHARED, 0),
        (OWN.format(rank=0), 0),
        (OWN.format(rank=1), 1),
    ]
    assert not job.temporaries()


# ---- one file that several ranks write -------------------------------------------------------------------------------


def test_of_a_file_that_two_ranks_write_the_lowest_one_s_is_taken(job: Job) -> None:  # noqa: F811
    for value in (1.0, 2.0):
        assert save_twins(job, "a", replica(0, value), replica(1, value)) == [None, None]
        assert_of_rank_0(job, "a", value)
    assert (job.roots[0] / "latest").read_text() == "a"


@pytest.mark.parametrize(
    "other",
    [replica(1, 2.0, extra=7), replica(1, 2.0) | {"note": "another"}, {"weights": torch.ones(7), "note": "the same"}],
    ids=["a key more", "another value", "another shape"],
)
def test_twins_that_are_not_alike_are_refused(other: Any, job: Job) -> None:  # noqa: F811
    assert save_twins(job, "a", replica(0, 1.0), replica(1, 1.0)) == [None, None]
    for error in save_twins(job, "a", replica(0, 2.0), other):
        assert isinstance(error, CheckpointError) and f"ranks 0 and 1 both write '{SHARED}', and not the same" in str(error)
    assert_of_rank_0(job, "a", 1.0)


def test_numbers_that_may_differ_between_twins(tmp_path: Path, native: Any) -> None:
    """But nothing beside them may."""
    job = Job(tmp_path, varying=("replica",))  # noqa: F811
    for ranks in ((0, 1), (255, 256), (1, 70_000)):
        twins = [replica(rank, 1.0, place={"replica": number, "of": 2}) for rank, number in enumerate(ranks)]
        assert save_twins(job, "a", *twins) == [None, None]
        assert_same(twins[0], torch.load(tmp_path / "a" / SHARED))
    twins = [replica(rank, 1.0, place={"replica": rank, "of": rank}) for rank in range(2)]
    assert all("not the same" in str(error) for error in save_twins(job, "b", *twins))
    assert not job.temporaries()
    job.close()


@pytest.mark.parametrize("call", ["fdatasync", "pwritev"])
def test_twins_of_a_save_that_fails_leave_nothing(call: str, job: Job, native: Any) -> None:  # noqa: F811
    assert save_twins(job, "a", replica(0, 1.0), replica(1, 1.0)) == [None, None]
    native.set_fault(call, path_part="rank_1", error=errno.EIO)
    assert all(isinstance(error, (StorageError, PeerError)) for error in save_twins(job, "a", replica(0, 2.0), replica(1, 2.0)))
    native.clear_faults()
    assert_of_rank_0(job, "a", 1.0)


def test_twins_of_a_save_that_fails_once_it_is_decided(job: Job, native: Any) -> None:  # noqa: F811
    native.set_fault("rename", path_part="expert_0", count=1, error=errno.EIO)
    errors = save_twins(job, "a", replica(0, 1.0), replica(1, 1.0))
    assert isinstance(errors[0], StorageError) and isinstance(errors[1], PeerError), errors
    native.clear_faults()
    left = sorted(path.name.split(".pt")[0] for path in job.temporaries())
    assert left == [".tmp-expert_0_model_states", ".tmp-rank_0_optim_states"], "those that the manifest names"
    assert_of_rank_0(job, "a", 1.0)


@pytest.mark.parametrize("point", ["prepared", "published", "placed"])
def test_a_crash_among_twins(point: str, tmp_path: Path, native: Any) -> None:
    program = f"""
from pathlib import Path
from ckpt import _native
from test_bundle_agreement import Job, replica, save_twins
job = Job(Path({str(tmp_path)!r}))
assert save_twins(job, "a", replica(0, 1.0), replica(1, 1.0)) == [None, None]
_native.set_crash_point({point!r})
save_twins(job, "a", replica(0, 2.0), replica(1, 2.0))
"""
    paths = os.environ | {"PYTHONPATH": PYTHONPATH}
    ended = subprocess.run([sys.executable, "-c", program], env=paths, capture_output=True, text=True, timeout=120)
    assert ended.returncode < 0, ended.stderr
    job = Job(tmp_path)  # noqa: F811
    assert job.save("b", 3.0) == [None, None], "the first save of a job removes what a crash has left"
    assert_of_rank_0(job, "a", 1.0 if point == "prepared" else 2.0)
    job.close()


def test_what_one_rank_writes_twice_is_the_last_of_them(job: Job) -> None:  # noqa: F811
    def act(rank: int) -> BaseException | None:
        bundle = job.ranks[rank].begin(job.roots[rank], "a")
        for value in (1.0, 2.0)[: 2 - rank]:
            bundle.save(replica(rank, value, twice=value), job.roots[rank] / "a" / f"{rank}.pt")
        return bundle.commit().exception(60)

    assert job.both(act) == [None, None]
    assert job.find("a") == ["a", "a"]
    assert_same(replica(0, 2.0, twice=2.0), torch.load(job.roots[0] / "a" / "0.pt"))
    assert not job.temporaries()


# ---- directories and names that differ -------------------------------------------------------------------------------


def begin_errors(job: Job, names: tuple[str, str], **how: Any) -> list[BaseException | None]:  # noqa: F811
    """Of begin() itself, and not of what would come of it in the background."""

    def act(rank: int) -> BaseException | None:
        try:
            job.ranks[rank].begin(job.roots[rank], names[rank], **how).commit().exception(60)
        except CheckpointError as error:
            return error
        return None

    return job.both(act)


def assert_refused(errors: list[BaseException | None], text: str) -> None:
    assert all(type(error) is CheckpointError for error in errors), errors
    assert str(errors[0]) == str(errors[1]) and text in str(errors[0])


def test_names_that_differ_are_refused_at_once(job: Job) -> None:  # noqa: F811
    for _ in range(3):
        assert_refused(begin_errors(job, ("of-0", "of-1")), "rank 1 saves 'of-1' where rank 0 saves 'of-0'")
    assert job.save("a", 1.0) == [None, None]
    job.assert_found("a", 1.0)
    for rank in job.ranks:
        rank.wait()  # what was refused is no save that has failed


def test_directories_that_differ_are_refused_at_once(job: Job) -> None:  # noqa: F811
    one = job.roots[0]
    job.roots = [one / "of-0", one / "of-1"]
    assert_refused(begin_errors(job, ("a", "a")), f"rank 1 saves to '{one / 'of-1'}' where rank 0 saves to '{one / 'of-0'}'")
    assert not (one / "of-1").exists()
    job.roots = [one, one]
    assert job.save("a", 1.0) == [None, None]
    job.assert_found("a", 1.0)


def test_a_directory_by_another_name_on_each_rank(job: Job) -> None:  # noqa: F811
    (job.roots[0] / "link").symlink_to(job.roots[0])
    job.roots[1] = job.roots[0] / "link"
    assert job.save("a", 1.0) == [None, None]
    job.assert_found("a", 1.0)


def test_where_only_rank_0_writes_the_directories_of_others_do_not_count(job: Job) -> None:  # noqa: F811
    one = job.roots[0]
    job.roots = [one / "of-0", one / "of-1"]

    def act(rank: int) -> BaseException | None:
        bundle = job.ranks[rank].begin(job.roots[rank], "a", together=False)
        if rank == 0:
            bundle.save(replica(0, 1.0), job.roots[0] / "weights.bin")
        return bundle.commit().exception(60)

    assert job.both(act) == [None, None]
    assert_same(replica(0, 1.0), torch.load(job.roots[0] / "weights.bin"))


@pytest.mark.parametrize("job", [IMPATIENT], ids=[""], indirect=True)
def test_a_rank_that_does_not_begin_is_named(job: Job) -> None:  # noqa: F811
    with pytest.raises(PeerError, match="rank 1 did not answer"):
        job.ranks[0].begin(job.roots[0], "a")
