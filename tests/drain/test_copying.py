"""Each byte that a node delivers is read once and written once; what was written but not synced is not relied on."""

from __future__ import annotations

import errno
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from node_roots import Job, MiB

from ckpt import _native
from ckpt.directory.manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt.drain import node as nodes
from ckpt.drain.copying import Copier
from ckpt.drain.journal import Progress
from ckpt.drain.pacing import FixedRate
from ckpt.drain.parts import SLICE_BYTES, Delivered, Part, expect_whole, parts_of
from ckpt.drain.stopping import Stop
from ckpt.errors import CorruptError, StorageError
from ckpt.storage.block_files import Block, BlockReader, BlockWriter


class Books:
    """Of all that is read and written, as (offset, bytes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, int]] = []
        self.written: list[tuple[int, int]] = []
        read, write = BlockReader.read, BlockWriter.write

        def note_read(file: BlockReader, block: Block, offset: int) -> int:
            count = read(file, block, offset)
            self.read.append((offset, count))
            return count

        def note_write(file: BlockWriter, block: Block, begin: int, end: int, offset: int) -> None:
            write(file, block, begin, end, offset)
            self.written.append((offset, end - begin))

        monkeypatch.setattr(BlockReader, "read", note_read)
        monkeypatch.setattr(BlockWriter, "write", note_write)


def follows(ranges: list[tuple[int, int]], begin: int, end: int) -> bool:
    for offset, count in sorted(ranges):
        if offset != begin:
            return False
        begin += count
    return begin == end


def copier(stop: Stop | None = None, note: Callable[[int], None] = lambda copied: None) -> Copier:
    return Copier(FixedRate(1e15), stop or Stop(), True, note)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_byte_is_copied_once(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, books = Job(tmp_path, count), Books(monkeypatch)
    saved = job.save(1, size=9 * MiB + 1, common=17 * MiB + 11)
    delivered, written = [], {name: [] for name in saved.content}
    (tmp_path / "inbox").mkdir()
    for number, root in enumerate(job.roots):
        for part in parts_of(saved.manifest, nodes.read(root).place):
            name, progress = part.entry.name, Progress()
            books.read.clear()
            books.written.clear()
            copier().copy(root / "step-000000000001" / name, tmp_path / "inbox" / name, part, progress)
            assert follows(books.read, 0, part.entry.bytes) and follows(books.written, part.begin, part.end)
            written[name] += books.written
            delivered.append(Delivered(name, part.begin, part.end, progress.part_crc32))
            assert part.shared == (count > 1 and "replicated" in name), number
    for name, content in saved.content.items():
        assert follows(written[name], 0, len(content))
        (path,) = (tmp_path / "inbox").glob(f"{name}*")
        assert path.read_bytes() == content
    expect_whole(saved.manifest.files, delivered)
    for wrong in (delivered[1:], delivered + delivered[-1:], [delivered[0]._replace(crc32=1), *delivered[1:]]):
        with pytest.raises(CorruptError, match="was delivered"):
            expect_whole(saved.manifest.files, wrong)


@pytest.mark.parametrize("size", [0, 1, SLICE_BYTES, 3 * SLICE_BYTES - 1, 3 * SLICE_BYTES, 10 * SLICE_BYTES + 7])
def test_parts_make_up_each_file(size: int, tmp_path: Path) -> None:
    entry = FileEntry("replicated.pt", size, 0, REPLICATED, 0)
    own = FileEntry("rank-00001.pt", size, 0, RANK, 1)
    job = Job(tmp_path, 3)
    found = [part for root in job.roots for part in parts_of(Manifest(1, 1, 3, (entry, own)), nodes.read(root).place)]
    assert follows([(part.begin, part.end - part.begin) for part in found if part.entry == entry], 0, size)
    assert [(part.begin, part.end) for part in found if part.entry == own] == [(0, size)]


def one_file(tmp_path: Path, size: int) -> tuple[Path, Path, Part, bytes]:
    content = random.Random(size).randbytes(size)
    (tmp_path / "a").write_bytes(content)
    entry = FileEntry("a", size, zlib.crc32(content))
    return tmp_path / "a", tmp_path / "b", Part(entry, 0, size, shared=False), content


@pytest.mark.parametrize(("call", "skip"), [("pwrite", 0), ("pwrite", 1), ("fsync", 0), ("ftruncate", 0), ("pread", 1)])
def test_after_a_failure_it_begins_where_the_last_sync_was(
    call: str, skip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: object
) -> None:
    source, target, part, content = one_file(tmp_path, 20 * MiB + 9)
    progress, books = Progress(), Books(monkeypatch)
    _native.set_fault(call, str(tmp_path), skip=skip, count=1, error=errno.EIO)
    with pytest.raises(StorageError, match="failed on"):
        copier().copy(source, target, part, progress)
    assert progress == Progress(), "nothing was synced, nothing is relied on"
    books.written.clear()
    copier().copy(source, target, part, progress)
    assert follows(books.written, 0, part.end) and target.read_bytes() == content


def test_it_ends_behind_a_chunk_and_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, part, content = one_file(tmp_path, 20 * MiB + 9)
    progress, books, stop, noted = Progress(), Books(monkeypatch), Stop(), []
    stop.set()
    with pytest.raises(Exception, match="asked to end"):
        copier(stop, noted.append).copy(source, target, part, progress)
    assert progress.done == 8 * MiB and noted == [8 * MiB] and not target.exists()
    copier().copy(source, target, part, progress)
    assert follows(books.read, 0, part.end) and follows(books.written, 0, part.end)
    assert target.read_bytes() == content


def copied_in_part(tmp_path: Path) -> tuple[Path, Path, Part, bytes, Progress]:
    """One file, of which the first chunk is at home."""
    source, target, part, content = one_file(tmp_path, 20 * MiB + 9)
    progress, stop = Progress(), Stop()
    stop.set()
    with pytest.raises(Exception, match="asked to end"):
        copier(stop).copy(source, target, part, progress)
    return source, target, part, content, progress


def test_what_is_gone_at_home_is_copied_again(tmp_path: Path) -> None:
    source, target, part, content, progress = copied_in_part(tmp_path)
    (tmp_path / "b.part").unlink()
    copier().copy(source, target, part, progress)
    assert target.read_bytes() == content


def test_a_good_file_is_not_called_damaged(tmp_path: Path) -> None:
    """What was noted of it was wrong."""
    source, target, part, content, progress = copied_in_part(tmp_path)
    progress.crc32 ^= 1
    copier().copy(source, target, part, progress)
    assert target.read_bytes() == content and progress.crc32 == part.entry.crc32


def test_a_damaged_file_gets_no_name(tmp_path: Path) -> None:
    source, target, part, content = one_file(tmp_path, 3 * MiB)
    source.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptError, match="it is damaged"):
        copier().copy(source, target, part, Progress())
    assert not target.exists()
