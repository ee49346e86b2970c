"""A file of which nobody gets a byte that was not verified, read as torch's reader of archives reads it."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import pytest

from ckpt.directory.sharded_files import PieceChecksums, checksums_path
from ckpt.errors import CorruptError
from ckpt.restore.verified_file import VerifiedFile

pytestmark = pytest.mark.usefixtures("native")

PIECE = 64


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    crc32s = [zlib.crc32(content[at : at + PIECE]) for at in range(0, len(content), PIECE)]
    checksums_path(path).write_bytes(PieceChecksums(len(content), PIECE, crc32s).to_bytes())
    return path


@pytest.fixture
def content() -> bytes:
    return os.urandom(10 * PIECE + 7)


def test_it_reads_what_is_there(content: bytes, tmp_path: Path) -> None:
    with VerifiedFile(written(tmp_path / "file", content)) as file:
        for begin, size in [(0, 1), (0, PIECE), (3, 5 * PIECE), (5 * PIECE, 2 * PIECE), (10 * PIECE - 1, 8), (0, len(content))]:
            file.seek(begin)
            assert file.read(size) == content[begin : begin + size]
        assert file.read(1) == b""


@pytest.mark.parametrize("size", [1, 3 * PIECE], ids=["by a piece", "without a copy"])
def test_whoever_asks_again_gets_the_first_error(size: int, content: bytes, tmp_path: Path) -> None:
    """torch's reader calls read() while the error of readinto() is set, and Python may take that for an error of its own."""
    path = written(tmp_path / "file", content)
    path.write_bytes(content[: 4 * PIECE] + bytes([content[4 * PIECE] ^ 1]) + content[4 * PIECE + 1 :])
    with VerifiedFile(path) as file:
        file.seek(4 * PIECE)
        with pytest.raises(CorruptError, match="fails a CRC-32: some of its bytes 256 to 319 have changed") as first:
            file.readinto(bytearray(size))
        path.write_bytes(content)
        with pytest.raises(CorruptError) as again:
            file.read(size)
        assert again.value is first.value
        file.seek(0)
        with pytest.raises(CorruptError) as again:
            file.readinto(bytearray(1))
        assert again.value is first.value


def test_so_it_does_if_the_disk_fails_for_a_moment(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "not now")

    with VerifiedFile(written(tmp_path / "file", content)) as file:
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", fail)
            with pytest.raises(OSError, match="not now") as first:
                file.readinto(bytearray(PIECE))
        with pytest.raises(OSError, match="not now") as again:
            file.read(PIECE)
        assert again.value is first.value
