"""The text of a manifest: what it says is what is read, also of thousands of files, and nothing else passes for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry, Manifest

CREATED = "2026-11-30T12:00:00.000+00:00"
FILES = tuple(FileEntry(f"rank-{rank:05d}.pt", rank * 1000, 0xFFFFFFFF - rank, "rank", rank) for rank in range(3))
ODD = (
    FileEntry('quote", {"a": 1}, {\u2028.pt', 1, 2, "replicated", 0, "temporary\n}, {", "called ä"),
    *(dataclasses.replace(file, temporary=f".{file.name}.tmp", called=f"other-{file.name}") for file in FILES),
)
MANIFESTS = [
    Manifest(3, 7, 3, FILES, CREATED),
    Manifest(3, 7, 3, ODD, CREATED, ("others", 'x"y'), "bundle", False, (("loss", 0.1), ("a b", -1e300)), {"blocked_s": 1e-06}),
    Manifest(0, 0, 1, FILES[:1], CREATED, metrics=(("count", 3.0),), cost={"flushed_s": 2.0, "blocked_s": 0.0}),
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_known", manifests._Known())


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_what_is_written_is_what_is_read(manifest: Manifest) -> None:
    content = manifest.to_json()
    assert manifests.parse(content) == manifest
    said = json.loads(content)
    assert manifests.with_checksum({key: value for key, value in said.items() if key != "crc32"}) == content
    assert json.loads(json.dumps(said, indent=4)) == said and manifests.parse(json.dumps(said, indent=4).encode()) == manifest
    lines = content.decode().splitlines()
    assert [line for line in lines if line.startswith("  {")] and len(lines) < 20 + len(manifest.files) + len(manifest.others)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_what_is_known_is_what_would_be_read(manifest: Manifest) -> None:
    content = manifest.to_json()
    manifests.note_written(content, manifest)
    assert manifests.parse(content) is manifest
    assert manifests._parse(content) == manifest


def test_what_a_file_shares_is_read_and_makes_no_other_file_of_it() -> None:
    """Each node that writes what is replicated may share otherwise."""
    sharing = dataclasses.replace(FILES[1], shared_bytes=4096, shared_step=2)
    (found,) = manifests.parse(Manifest(3, 7, 2, (sharing,), CREATED).to_json()).files
    assert (found.shared_bytes, found.shared_step) == (4096, 2)
    assert found == FILES[1] and {found} == {FILES[1]}


@pytest.mark.parametrize("changes", [{"created": ""}, {"moves_latest": False}])
def test_what_is_not_written_as_a_whole_is_read_again(changes: dict[str, Any]) -> None:
    """A manifest that leaves its time open gets one, and a step has no word of `latest`."""
    manifest = dataclasses.replace(MANIFESTS[0], **changes)
    content = manifest.to_json()
    manifests.note_written(content, manifest)
    assert manifests.parse(content) != manifest


def test_a_changed_manifest_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / manifests.NAME
    content = MANIFESTS[0].to_json()
    path.write_bytes(content)
    assert manifests.read(tmp_path) == MANIFESTS[0] and manifests.read(tmp_path) is manifests.read(tmp_path)
    path.write_bytes(content.replace(b"rank-00001.pt", b"rank-00009.pt"))
    assert manifests.read_if_any(tmp_path) is None, "its checksum is that of other words"
    path.write_bytes(content)
    assert manifests.read(tmp_path) == MANIFESTS[0]


def test_no_more_is_known_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [dataclasses.replace(MANIFESTS[0], step=step).to_json() for step in range(10)]
    monkeypatch.setattr(manifests._Known, "MOST_BYTES", 3 * len(contents[0]))
    for content in contents:
        manifests.parse(content)
    assert [manifests._known.find(content) is not None for content in contents] == [False] * 7 + [True] * 3
    manifests.parse(contents[7])
    manifests.parse(contents[0])
    assert manifests._known.find(contents[7]) is not None and manifests._known.find(contents[8]) is None, "the oldest goes"
