"""LocalStore: what is put there is whole under its key, and durable; what is not whole is not there."""

from __future__ import annotations

import os
import resource
import threading
import zlib
from pathlib import Path

import pytest

import ckpt
from ckpt.errors import CorruptError, StorageError
from ckpt.storage.stores import LocalStore, StoredObject

CONTENT = bytes(range(256)) * 40_000  # several chunks, the last one not full


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def keys(store: LocalStore, prefix: str = "") -> list[str]:
    return [each.key for each in store.list(prefix)]


def files(store: LocalStore) -> set[str]:
    return {path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file()}


def read(store: LocalStore, key: str) -> bytes:
    with store.open(key) as file:
        return file.read()


def test_what_is_put_is_read(store: LocalStore, source: Path) -> None:
    store.put("step-1/rank-0.pt", source, zlib.crc32(CONTENT))
    store.replace("step-1/manifest.json", b"{}")
    store.replace("latest", b"step-1")
    assert read(store, "step-1/rank-0.pt") == CONTENT and read(store, "latest") == b"step-1"
    assert store.list("") == [
        *(StoredObject("latest", 6), StoredObject("step-1/manifest.json", 2)),
        StoredObject("step-1/rank-0.pt", len(CONTENT)),
    ]
    assert keys(store, "step-1/r") == ["step-1/rank-0.pt"] and keys(store, "step") == keys(store, "step-1/")
    assert keys(store, "step-2/") == keys(store, "nothing") == []


def test_a_source_with_other_bytes(store: LocalStore, source: Path) -> None:
    store.put("file", source, zlib.crc32(CONTENT))
    with source.open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"\0" * 9)
    with pytest.raises(CorruptError, match=r"CRC-32 [0-9a-f]{8} where [0-9a-f]{8} was expected"):
        store.put("file", source, zlib.crc32(CONTENT))
    assert read(store, "file") == CONTENT and files(store) == {"file"}


def test_a_full_disk(store: LocalStore, source: Path) -> None:
    """A limit on the size of files stands for it: the error is another, the place is the same."""
    store.put("file", source, zlib.crc32(CONTENT))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"copying .* failed: File too large"):
            store.put("file", source, zlib.crc32(CONTENT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read(store, "file") == CONTENT and files(store) == {"file"}


def test_a_reader_keeps_what_it_has_opened(store: LocalStore) -> None:
    store.replace("latest", b"step-1")
    with store.open("latest") as file:
        store.replace("latest", b"step-2")
        assert file.read() == b"step-1" and read(store, "latest") == b"step-2"


def test_readers_see_one_content_or_the_other(store: LocalStore) -> None:
    contents = {bytes([number]) * 5000 for number in range(20)}
    store.replace("latest", min(contents))
    stop, seen = threading.Event(), set()

    def look() -> None:
        while not stop.is_set():
            seen.add(read(store, "latest"))

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for content in sorted(contents) * 5:
            store.replace("latest", content)
    finally:
        stop.set()
        reader.join()
    assert seen <= contents and keys(store) == ["latest"]


def test_what_is_removed(store: LocalStore, source: Path) -> None:
    store.put("a/file", source, zlib.crc32(CONTENT))
    store.remove("a/file")
    store.remove("a/file")
    store.remove("never/was")
    assert keys(store) == []
    with pytest.raises(StorageError, match=r"cannot read '.*a/file': No such file"):
        store.open("a/file")


def test_what_is_on_its_way_is_not_listed(store: LocalStore) -> None:
    """As a killed process leaves it, and as retention removes a step."""
    store.replace("step-1/file", b"x")
    (store.root / ".tmp-file-0badcafe-1-0badcafe0").write_bytes(b"half")
    (store.root / "step-1").rename(store.root / ".tmp-step-1-0badcafe-1-0badcafe1")
    assert keys(store) == [] and len(files(store)) == 2


def test_links_do_not_lead_out(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"x")
    (store.root / "link").symlink_to(tmp_path / "elsewhere")
    assert keys(store) == []


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a//b", "../up", "a/..", "./a", "a/"])
def test_keys_that_are_none(key: str, store: LocalStore, source: Path) -> None:
    for call in (
        *(lambda: store.put(key, source, 0), lambda: store.replace(key, b"")),
        *(lambda: store.open(key), lambda: store.remove(key)),
    ):
        with pytest.raises(ValueError, match="a key is a relative path"):
            call()


def test_what_cannot_be_a_store(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ckpt.CheckpointError, match="not a directory"):
        LocalStore(source / "below")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match="it is a FIFO"):
        LocalStore(tmp_path / "store").put("file", tmp_path / "fifo", 0)
    with pytest.raises(StorageError, match=r"copying .* failed: No such file"):
        LocalStore(tmp_path / "store").put("file", tmp_path / "gone", 0)
