"""The directory of a run on the disk of a node: what the drain reads there, what is known of it, and what has room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node_roots import RUN, Job
from tier_places import storage_of

from ckpt.directory import manifest as manifests
from ckpt.directory.keeping import Keeping
from ckpt.directory.node_place import NodePlace
from ckpt.directory.step_names import step_name
from ckpt.drain import node as nodes
from ckpt.drain.node import began_at
from ckpt.errors import StorageError
from ckpt.tiers.node_storage import NodeStorage, Survey, identity, this_process
from ckpt.tiers.tier import Tier


def made(base: Path, **settings: Any) -> NodeStorage:
    storage = NodeStorage(Tier.node(base / "nvme", **settings), base / "home", RUN)
    storage.make()
    return storage


def describe(storage: NodeStorage, **changes: Any) -> bool:
    said: dict[str, Any] = {
        "node": 1,
        "nodes": 2,
        "world_size": 8,
        "ranks": [5, 4],
        "home_keeping": Keeping(3),
        "direct_io": True,
    }
    return storage.describe_node(**{**said, "pids": {7: 70, 6: 60}, **changes})


# ---- describing ------------------------------------------------------------------------------------------------------


def test_the_drain_reads_what_was_described(tmp_path: Path) -> None:
    storage = made(tmp_path, keep=None, rate="200MB")
    assert describe(storage, home_every={"steps": 100})
    node = nodes.read(storage.root)
    assert (node.run, node.home, node.place) == (RUN, tmp_path / "home", NodePlace(1, 2, (4, 5)))
    assert (node.keep, node.home_keeping, node.rate) == (None, Keeping(3), 200_000_000)
    assert (node.every_steps, node.every_s, node.direct_io, node.pace) == (100, None, True, storage.pace.name)
    assert node.pids == {6: 60, 7: 70}
    keeping = Keeping(None, 10, 2, "loss", "max", (3, 7))
    describe(storage, home_every={"seconds": 1.5}, home_keeping=keeping)
    assert (nodes.read(storage.root).every_s, nodes.read(storage.root).home_keeping) == (1.5, keeping)


def test_it_is_written_only_if_it_changes(tmp_path: Path) -> None:
    storage = made(tmp_path)
    path = storage.root / nodes.NAME
    assert describe(storage)
    before = path.stat()
    assert not describe(storage, ranks=(4, 5)) and path.stat().st_ino == before.st_ino
    assert describe(storage, pids=this_process())
    assert nodes.read(storage.root).is_trained() and nodes.read(storage.root).rate is None
    assert {entry.name for entry in storage.root.iterdir()} == {nodes.NAME, "drain"}


def test_an_error_leaves_what_was_there(tmp_path: Path, native: Any) -> None:
    storage = made(tmp_path)
    describe(storage)
    before = (storage.root / nodes.NAME).read_bytes()
    native.set_fault("rename", nodes.NAME, error=5)
    with pytest.raises(StorageError):
        describe(storage, node=0)
    assert (storage.root / nodes.NAME).read_bytes() == before


def test_this_process_is_told_from_a_later_one_of_its_number() -> None:
    assert this_process() == {os.getpid(): began_at(os.getpid())}


def test_nodes_are_told_apart_by_their_disks(tmp_path: Path) -> None:
    one = identity(tmp_path / "a" / "ckpt")
    assert one == identity(tmp_path / "a" / "ckpt") and one != identity(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert identity(tmp_path / "link" / "ckpt") == one
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        identity(tmp_path / "file")


def test_waking_is_seen_and_needs_nothing(tmp_path: Path) -> None:
    storage = made(tmp_path)
    storage.wake()
    path = storage.root / "drain" / "wake"
    os.utime(path, ns=(1, 1))
    storage.wake()
    assert path.stat().st_mtime_ns > 1
    NodeStorage(Tier.node(tmp_path / "nowhere"), tmp_path, RUN).wake()


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_nothing_lies_where_nothing_was_saved(tmp_path: Path) -> None:
    assert made(tmp_path).survey() == Survey("", -1)
    assert NodeStorage(Tier.node(tmp_path / "nowhere"), tmp_path, RUN).survey() == Survey("", -1)


def test_the_highest_step_and_number_are_found_wherever_they_stand(tmp_path: Path) -> None:
    job = Job(tmp_path)
    storage = storage_of(job, tmp_path)
    job.save(30)
    job.save(10)
    assert storage.survey() == Survey(step_name(30), 2)
    (storage.root / step_name(40)).mkdir()  # a save that was never committed
    (storage.root / step_name(10) / manifests.NAME).write_text("{}")
    assert storage.survey() == Survey(step_name(40), 1)
    (storage.root / "drain" / "000000000009.json").write_text("")  # of a generation that went long since
    (storage.root / "drain" / "000000000099.txt").touch()
    assert storage.survey() == Survey(step_name(40), 9)


# ---- room ------------------------------------------------------------------------------------------------------------


def test_a_limit_counts_what_lies_there_and_what_is_underway(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1, size=100_000)
    storage = NodeStorage(Tier.node(tmp_path / "node0", max_bytes=300_000), job.home, RUN)
    assert storage.has_room(150_000) and not storage.has_room(205_000)
    assert not storage.has_room(150_000, {step_name(2): 80_000})
    job.save(2, size=80_000)
    assert not storage.has_room(150_000) and storage.has_room(90_000)
    (storage.root / step_name(3)).mkdir()
    (storage.root / step_name(3) / ".tmp-rank-00000.pt").write_bytes(bytes(50_000))
    assert storage.has_room(20_000, {step_name(3): 60_000}), "what is written already does not count twice"
    assert not storage.has_room(60_000, {step_name(3): 60_000}) and not storage.has_room(80_000)
    (storage.root / step_name(1)).rename(storage.root / ".tmp-going")
    assert not storage.has_room(100_000), "what is being removed takes space until it is gone"
    for path in (storage.root / ".tmp-going").iterdir():
        path.unlink()
    assert storage.has_room(100_000)


def test_a_step_that_is_saved_again_is_measured_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(1, size=10_000)
    storage = NodeStorage(Tier.node(tmp_path / "node0", max_bytes=400_000), job.home, RUN)
    assert storage.has_room(300_000)
    job.save(1, size=200_000)
    assert not storage.has_room(300_000) and storage.has_room(100_000)


def test_committed_steps_are_not_walked_through_at_each_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    job.save(1)
    job.save(2)
    storage = NodeStorage(Tier.node(tmp_path / "node0", max_bytes="1GiB"), job.home, RUN)
    assert storage.has_room(1)
    looked: list[str] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (looked.append(str(path)), real(path))[1])
    assert storage.has_room(1) and looked == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(path)], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_disk_has_the_room_that_it_has(small_disk: Path) -> None:
    storage = made(small_disk)
    assert storage.has_room(6 << 20) and not storage.has_room(8 << 20)
    assert not storage.has_room(4 << 20, {step_name(1): 4 << 20})
    storage.step_directory(step_name(1)).mkdir()
    (storage.step_directory(step_name(1)) / ".tmp-a").write_bytes(bytes(4 << 20))
    assert not storage.has_room(4 << 20) and storage.has_room(2 << 20, {step_name(1): 4 << 20})
