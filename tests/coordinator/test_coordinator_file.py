"""The coordinator over a shared directory: on a disk that is full, and what its messages say."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault.test_disk_full import fill, small_disk
from support import patience
from test_coordinator import close_together, exchange_together, make_together, without_ranks

from ckpt.coordinator.base import Coordinator
from ckpt.coordinator.launchers import world_of
from ckpt.coordinator.shared_directory import FOLDER, RESERVE_BYTES, FileCoordinator
from ckpt.errors import PeerError, StorageError

__all__ = ["small_disk"]

TIMEOUT_S = patience(10.0)


def make_ranks(place: Path, size: int = 2) -> list[Coordinator]:
    return make_together([lambda rank=rank: FileCoordinator(place, rank, size, timeout_s=TIMEOUT_S) for rank in range(size)])


def reserves(place: Path) -> dict[str, int]:
    """Bytes that each reserve really takes on the disk, by name."""
    found = place.glob(f"{FOLDER}/s-*/reserve/*")
    return {path.name: path.stat().st_blocks * 512 for path in found}


# ---- a disk that is full -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["alone", "by node"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether rank 0 speaks for rank 1, too."""
    for name in os.environ.keys() - without_ranks().keys():
        monkeypatch.delenv(name)
    if request.param == "alone":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_messages_on_a_full_disk(small_disk: Path) -> None:
    ranks = make_ranks(small_disk)
    assert set(reserves(small_disk)) == {"0", "1"}
    assert all(size >= RESERVE_BYTES for size in reserves(small_disk).values())
    ballast = fill(small_disk, 0)
    with pytest.raises(OSError, match="No space"), open(small_disk / "more", "wb", buffering=0) as more:
        more.write(bytes(4096))
    assert exchange_together(ranks, "full/1") == [[b"0", b"1"]] * 2
    assert exchange_together(ranks, "full/2") == [[b"0", b"1"]] * 2
    assert reserves(small_disk).keys() < {"0", "1"}, "the disk was not full: this proves nothing"
    ballast.unlink()
    assert exchange_together(ranks, "free/1") == [[b"0", b"1"]] * 2
    assert set(reserves(small_disk)) == {"0", "1"}
    fill(small_disk, 0)
    assert exchange_together(ranks, "full/3") == [[b"0", b"1"]] * 2
    close_together(ranks)
    assert not (small_disk / FOLDER).exists()


@pytest.mark.usefixtures("way")
def test_a_reserve_that_cannot_be_written_is_done_without(small_disk: Path) -> None:
    (small_disk / FOLDER).mkdir()
    ballast = fill(small_disk, RESERVE_BYTES)
    ranks = make_ranks(small_disk)
    assert len(reserves(small_disk)) < 2
    ballast.unlink()
    assert exchange_together(ranks, "free/1") == [[b"0", b"1"]] * 2
    assert set(reserves(small_disk)) == {"0", "1"}, "written as soon as there was room"
    close_together(ranks)


@pytest.fixture
def ranks(tmp_path: Path, way: str) -> Iterator[list[Coordinator]]:
    made = make_ranks(tmp_path)
    yield made
    close_together(made)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_the_reserve_is_given_up_once(error: int, ranks: list[Coordinator], way: str, tmp_path: Path, native: Any) -> None:
    """That of who sends."""
    left = {"0"} if way == "alone" else {"1"}
    native.set_fault("fsync", "/posts/", count=1, error=error)
    native.set_fault("open", "/reserve/", error=error)  # not to be had again
    ranks[1].gather("one/1", b"one", TIMEOUT_S)
    assert set(reserves(tmp_path)) == left
    native.clear_faults()
    assert ranks[0].gather("one/1", b"zero", TIMEOUT_S) == [b"zero", b"one"]
    assert set(reserves(tmp_path)) == left
    ranks[1].gather("one/2", b"one", TIMEOUT_S)
    assert set(reserves(tmp_path)) == {"0", "1"}
    assert ranks[0].gather("one/2", b"zero", TIMEOUT_S) == [b"zero", b"one"]


@pytest.mark.parametrize(("call", "error"), [("fsync", errno.ENOSPC), ("write", errno.EDQUOT), ("open", errno.EACCES)])
def test_what_fails_as_a_storage_error_has_not_been_delivered(
    call: str, error: int, ranks: list[Coordinator], tmp_path: Path, native: Any
) -> None:
    native.set_fault(call, "/posts/", error=error)
    with pytest.raises(StorageError) as caught:
        ranks[1].gather("one/1", b"one", TIMEOUT_S)
    assert caught.value.errno == error
    native.clear_faults()
    with pytest.raises(PeerError, match="rank 1 did not answer"):
        ranks[0].gather("one/1", b"zero", 0.2)


def test_a_rename_that_may_have_happened_is_not_a_storage_error(ranks: list[Coordinator], native: Any) -> None:
    """A network file system can lose its answer to a rename that it has made."""
    native.set_fault("rename", "/posts/", error=errno.EIO)
    with pytest.raises(PeerError, match=r"rank 1 could not post 'one/1' to rank 0: .*rename failed"):
        ranks[1].gather("one/1", b"one", TIMEOUT_S)
    native.clear_faults()


# ---- who is missing --------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    for name in os.environ.keys() - without_ranks().keys():
        monkeypatch.delenv(name)

    def launch(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize("rank", [0, 1])
def test_who_misses_ranks_says_where_it_knows_of_them_from(rank: int, launched: Callable[..., None], tmp_path: Path) -> None:
    launched(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS="2")
    with pytest.raises(PeerError) as caught:
        FileCoordinator(tmp_path, timeout_s=0.1)
    assert f"this is rank {rank} of 2 as SLURM_PROCID and SLURM_STEP_NUM_TASKS say" in str(caught.value)
    assert 'coordinator="local"' in str(caught.value)
    with pytest.raises(PeerError) as caught:
        FileCoordinator(tmp_path, rank, 2, timeout_s=0.1)
    assert "SLURM" not in str(caught.value)


def test_a_batch_script_of_slurm_is_one_process() -> None:
    """sbatch gives it the number of tasks of the whole job."""
    assert world_of({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert world_of({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}) == (1, 2)
