"""Every byte of an archive that counts is looked at, by the quick way as by that of zipfile."""

from __future__ import annotations

import io
import zipfile

import torch

from ckpt.upkeep import zip_check
from ckpt.upkeep.zip_check import first_bad_record, has_checksums


def archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(20), "b": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def test_a_good_one_takes_the_quick_way() -> None:
    assert zip_check._is_good(memoryview(archive())) and first_bad_record(archive()) is None


def test_what_is_changed_is_judged_as_by_zipfile() -> None:
    content = archive()
    bad = 0
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 0x40
        try:
            with zipfile.ZipFile(io.BytesIO(changed)) as whole:
                expected = whole.testzip()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError):
            expected = "no archive"
        bad += expected is not None
        if expected is not None:
            assert not zip_check._is_good(memoryview(changed)), f"byte {at}"
    assert bad > 20 * 8


def test_each_record_is_looked_at() -> None:
    content = archive()
    with zipfile.ZipFile(io.BytesIO(content)) as whole:
        for entry in whole.infolist():
            changed = bytearray(content)
            at = content.index(whole.read(entry), entry.header_offset + 30)
            changed[at] ^= 1
            assert first_bad_record(changed) == entry.filename
            assert not zip_check._is_good(memoryview(changed[:-1]))


def test_whether_there_are_checksums() -> None:
    """A record of nothing has 0 in any case."""
    empty, bare = io.BytesIO(), bytearray(archive())
    with zipfile.ZipFile(empty, "w") as made:
        made.writestr("nothing", b"")
        made.writestr("something", b"123")
    assert has_checksums(archive()) and has_checksums(empty.getvalue())
    at = bare.find(b"PK\x01\x02")
    while at >= 0:
        bare[at + 16 : at + 20] = bytes(4)
        at = bare.find(b"PK\x01\x02", at + 4)
    assert not has_checksums(bare) and first_bad_record(bare) is not None
