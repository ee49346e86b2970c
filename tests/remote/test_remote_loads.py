"""ckpt.load() and ckpt.load_into() of a file in an object store."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from object_server import Fault, ObjectServer, Proxy, options_for

import ckpt
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.errors import CorruptError, NotACheckpointError, StorageError
from ckpt.storage.object_store import ObjectStore

STATE = {"weight": torch.arange(200_000.0), "step": 7}
FOLDER = "step-000000000007/000000000003-0badcafe"


class Stored:
    """A checkpoint in the store, and where its file is."""

    def __init__(self, base: Path, bucket: str, port: int) -> None:
        self.store = ObjectStore(f"s3://{bucket}/run1", options_for(port))
        self.file = base / "state.pt"
        ckpt.save(STATE, self.file).result()
        crc32 = zlib.crc32(self.file.read_bytes())
        self.key, self.url = f"{FOLDER}/state.pt", f"{self.store.url}/{FOLDER}/state.pt"
        self.store.put(self.key, self.file, crc32)
        entry = FileEntry("state.pt", self.file.stat().st_size, crc32)
        self.store.replace(f"{FOLDER}/manifest.json", Manifest(7, 3, 1, (entry,)).to_json())


@pytest.fixture
def stored(tmp_path: Path, bucket: str, server: ObjectServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """Credentials and all else come from the environment."""
    for name, value in options_for(proxy.port).items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return Stored(tmp_path, bucket, server.port)


def test_a_file_is_loaded(stored: Stored, tmp_path: Path) -> None:
    found = ckpt.load(stored.url)
    assert torch.equal(found["weight"], STATE["weight"]) and found["step"] == 7
    assert [*ckpt.load(stored.url, keys="step")] == ["step"]
    target: dict[str, Any] = {"weight": torch.zeros(200_000), "step": 0}
    ckpt.load_into(stored.url, target)
    assert torch.equal(target["weight"], STATE["weight"]) and target["step"] == 7
    assert [*(tmp_path / "scratch").iterdir()] == []


def test_bytes_that_have_changed(stored: Stored, tmp_path: Path) -> None:
    """Nothing of the target is touched, although the damage is at the end."""
    content = bytearray(stored.file.read_bytes())
    content[-1] ^= 1
    stored.store.replace(stored.key, bytes(content))
    target = {"weight": torch.zeros(200_000), "step": 0}
    for call in (lambda: ckpt.load(stored.url), lambda: ckpt.load_into(stored.url, target)):
        with pytest.raises(CorruptError, match=r"'s3://.*/state.pt' has the CRC-32 .* where its manifest says"):
            call()
    assert not target["weight"].any() and [*(tmp_path / "scratch").iterdir()] == []


def test_an_object_that_is_too_short(stored: Stored) -> None:
    stored.store.replace(stored.key, stored.file.read_bytes()[:-100])
    with pytest.raises(CorruptError, match=r"state.pt' ends at byte"):
        ckpt.load(stored.url)


def test_what_has_no_manifest_is_no_checkpoint(stored: Stored) -> None:
    with pytest.raises(NotACheckpointError, match=r"names no 'other.pt'; it names state.pt"):
        ckpt.load(stored.url.replace("state.pt", "other.pt"))
    stored.store.remove(f"{FOLDER}/manifest.json")
    with pytest.raises(NotACheckpointError, match=r"holds no manifest.json"):
        ckpt.load(stored.url)


def test_a_manifest_that_is_none(stored: Stored) -> None:
    stored.store.replace(f"{FOLDER}/manifest.json", b"{}")
    with pytest.raises(CorruptError, match=r"is not a valid manifest"):
        ckpt.load(stored.url)


@pytest.mark.parametrize("url", ["s3://bucket/state.pt", "s3://bucket/run1/step-000000000007/state.pt", "ftp://x/y", "s3://"])
def test_urls_that_are_none_of_a_file(url: str) -> None:
    with pytest.raises(ValueError, match="the URL of a file is"):
        ckpt.load(url)


def test_a_store_that_refuses(stored: Stored, proxy: Proxy) -> None:
    proxy.rule = lambda _: Fault(status=403)
    with pytest.raises(StorageError, match=r"cannot read 's3://.*(AccessDenied|403)"):
        ckpt.load(stored.url)
