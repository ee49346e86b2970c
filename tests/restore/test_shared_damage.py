"""A block of the disk that goes bad in files that share it: restore() finds the newest checkpoint that has it not, and does not
read all of those that have it.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deadlines import patience
from mounting import MIB, mounted
from reuse_runs import Run
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.loading import archive
from ckpt.restore import file_readers, known_damage, sharded_reader
from ckpt.storage.extents import extents_of
from ckpt.upkeep import verifying


class Disk:
    """A file system that shares blocks, and the image on which it lies."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._image = place.with_name(f"{place.name}.xfs")

    def damage(self, path: Path, offset: int) -> None:
        """Changes a byte behind the back of the file system: a write to the file would give it a block of its own."""
        subprocess.run(["sync", "-f", str(self.place)], check=True, timeout=patience(60))
        extent = next(each for each in extents_of(path) or [] if each.begin <= offset < each.end)
        assert extent.at is not None
        descriptor = os.open(self._image, os.O_RDWR)
        try:
            at = extent.at + offset - extent.begin
            os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 0x10]), at)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for file in self.place.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted("xfs", tmp_path / "disk", 320 * MIB) as place:
        yield Disk(place)


def record_of(path: Path, size: int) -> archive.RecordEntry:
    """Of the only tensor of this size."""
    return next(each for each in archive.Archive(path).records.values() if each.size == size)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes by the names of steps."""
    counted: Counter[str] = Counter()

    class Counting(archive.Archive):
        def close(self) -> None:
            counted[self.path.parent.name] += self.bytes_read
            super().close()

        def fill(self, destinations: Any, **how: Any) -> int | None:
            try:
                return super().fill(destinations, **how)
            except ckpt.CorruptError:
                counted[self.path.parent.name] += self.bytes_read
                raise

    monkeypatch.setattr(file_readers, "Archive", Counting)
    monkeypatch.setattr(known_damage, "Archive", Counting)
    return counted


def name_of(step: int) -> str:
    return f"step-{step:012d}"


def test_those_that_share_it_are_not_read_as_a_whole(disk: Disk, read: Counter[str], caplog: pytest.LogCaptureFixture) -> None:
    """Step 6 was written anew, and those behind it have its blocks."""
    with Run(disk.place, refresh_every=5) as run:
        run.state["other"] = torch.randn(3 * MIB)
        shares = [run.save() > 0 for _ in range(11)]
        assert shares == [False, False, *[True] * 4, False, *[True] * 4]
    entry = record_of(run.file(10), 4 * MIB)
    disk.damage(run.file(10), entry.offset + entry.size // 2)
    with ckpt.Checkpointer(run.directory, keep=None, options=options()) as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == 5
    assert_same(run.saved[5], found.state)
    whole = run.file(5).stat().st_size
    assert read[name_of(10)] >= whole and read[name_of(5)] >= whole
    for step in (6, 7, 8, 9):
        assert entry.size <= read[name_of(step)] < entry.size + MIB
        assert f"checkpoint '{name_of(step)}' is passed over" in caplog.text

    bad = {verdict.checkpoint: verdict for step in range(5, 11) for verdict in verifying.verify(run.file(step).parent, False)}
    assert {path for path, verdict in bad.items() if verdict.state == verifying.BAD} == {
        str(run.file(step).parent) for step in range(6, 11)
    }
    verdict = bad[str(run.file(8).parent)]
    assert verdict.same_blocks == tuple(name_of(step) for step in (6, 7, 9, 10)) and name_of(9) in verdict.problem


# ---- the same damage, by whatever made it ----------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def states(step: int) -> dict[str, Any]:
    return {"large": torch.full((MIB // 2,), 0.5), "other": torch.full((MIB // 4,), float(step)), "step": step}


def test_in_the_files_of_a_sharded_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    fill = sharded_reader.ShardedReader.fill

    def counting(reader: sharded_reader.ShardedReader) -> None:
        read[str(reader._places.nearest.name)] += 1
        fill(reader)

    monkeypatch.setattr(sharded_reader.ShardedReader, "fill", counting)
    with ckpt.Checkpointer(tmp_path, keep=None, options=options()) as checkpointer:
        for step in range(4):
            checkpointer.save(step, sharded=states(step)).result(DEADLINE_S)
        for step in (2, 3):
            (data,) = (tmp_path / name_of(step)).glob("*.distcp")
            flip(data, data.stat().st_size // 4)
        target = states(9)
        found = checkpointer.restore(sharded_into=target)
    assert found is not None and found.step == 1
    assert_same(states(1), target)
    assert read == {name_of(3): 1, name_of(1): 1}


def test_in_the_files_of_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose files have other names each time."""
    verified: list[str] = []
    verify = file_readers.verify

    def noting(path: Path, *how: Any) -> None:
        verified.append(path.name)
        verify(path, *how)

    monkeypatch.setattr(file_readers, "verify", noting)
    with ckpt.BundleCheckpointer(options=options()) as checkpointer:
        for step in range(4):
            bundle = checkpointer.begin(tmp_path, f"step{step}", step=step)
            for number in range(2):
                bundle.save(states(step), bundle.directory / f"{step}-{number}.pt")
            bundle.commit().result(DEADLINE_S)
        for step in (2, 3):
            path = tmp_path / f"step{step}" / f"{step}-1.pt"
            flip(path, record_of(path, 2 * MIB).offset + MIB)
        assert checkpointer.find(tmp_path) == "step1"
    assert verified == ["3-0.pt", "3-1.pt", "1-0.pt", "1-1.pt"]


def test_retention_takes_none_of_them_for_good(tmp_path: Path) -> None:
    """Else it would remove the one that is, in favour of those that were only asked for the damage of another."""
    with ckpt.Checkpointer(tmp_path, keep=None, options=options()) as checkpointer:
        for step in range(5):
            checkpointer.save(step, states(step)).result(DEADLINE_S)
    for step in (2, 3, 4):
        path = tmp_path / name_of(step) / "state.pt"
        flip(path, record_of(path, 2 * MIB).offset + MIB)
    with ckpt.Checkpointer(tmp_path, keep=2, options=options()) as checkpointer:
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        checkpointer.save(5, states(5)).result(DEADLINE_S)
        assert {1, 5} <= {*checkpointer.steps()}
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len([each for each in events if each["event"] == "verify" and each["outcome"] == "damaged"]) == 3


def test_what_cannot_be_read(tmp_path: Path, native: Any) -> None:
    """Is looked for in the same bytes, and no others."""
    damage = known_damage.KnownDamage()
    with ckpt.Checkpointer(tmp_path, keep=None, options=options()) as checkpointer:
        for step in (0, 1):
            checkpointer.save(step, states(step)).result(DEADLINE_S)
    manifest = manifests.read(tmp_path / name_of(1))
    native.set_fault("pread", error=errno.EIO, path_part="state.pt")
    with pytest.raises(ckpt.StorageError) as caught:
        file_readers.verify(tmp_path / name_of(1) / "state.pt", manifest.files[0], DEADLINE_S)
    assert caught.value.bytes_at is not None
    damage.note(manifest.files, [("state.pt", caught.value)])
    older = tmp_path / name_of(0)
    with pytest.raises(ckpt.StorageError, match=name_of(0)):
        damage.look_for(older, manifests.read(older).files, DEADLINE_S)
    native.clear_faults()
    damage.look_for(older, manifests.read(older).files, DEADLINE_S)


def test_the_disk_of_another_layout_is_not_accused(tmp_path: Path) -> None:
    """At the place of the damage this one has other bytes, and they are good: it is read as ever."""
    with ckpt.Checkpointer(tmp_path, keep=None, options=options()) as checkpointer:
        checkpointer.save(0, {"short": torch.zeros(10)}).result(DEADLINE_S)
        checkpointer.save(1, {"between": torch.ones(MIB), **states(1)}).result(DEADLINE_S)
        checkpointer.save(2, states(2)).result(DEADLINE_S)
        path = tmp_path / name_of(2) / "state.pt"
        flip(path, record_of(path, 2 * MIB).offset + MIB)
        found = checkpointer.restore()
    assert found is not None and found.step == 1
