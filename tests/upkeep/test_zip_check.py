"""Every byte of an archive that counts is looked at, by the quick way as by that of zipfile."""

from __future__ import annotations

import io
import zipfile

import torch

from ckpt.upkeep import zip_check
from ckpt.upkeep.zip_check import first_bad_record


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
