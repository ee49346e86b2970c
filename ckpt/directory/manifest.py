"""manifest.json, the commit record: a directory is a checkpoint if and only if it holds a valid one."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt.collector import without_collector
from ckpt.errors import NotACheckpointError

NAME = "manifest.json"
FORMAT = 1
_LARGEST_BYTES = 1 << 26  # of a manifest; one entry a file, some 150 bytes each


RANK, REPLICATED = "rank", "replicated"
# What `rank` has written of a sharded state, the checksums of pieces of that, and what lies where.
SHARDED, SHARDED_CHECKSUMS, SHARDED_METADATA = "sharded", "sharded-checksums", "sharded-metadata"
FROZEN = "frozen"  # what does not change of what `rank` gave for itself, see frozen_files.py
_KINDS = (RANK, REPLICATED, SHARDED, SHARDED_CHECKSUMS, SHARDED_METADATA, FROZEN)
NAMED_BY_OTHERS = (SHARDED, SHARDED_CHECKSUMS, FROZEN)  # kinds of files that are called the same wherever they lie


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of the checkpoint: its name in the directory, its size in bytes, the CRC-32 of all its bytes.

    Its kind is "rank" (what `rank` gave for itself), "replicated" (what was the same on all ranks), one of a sharded state,
    see sharded_files.py, or "frozen", see frozen_files.py. `temporary`: the name that it had when the manifest was written, if
    that was before it got its own; a crash may have left it under this. `called`: the name that it gets at home, if it has
    another one on its node.
    `shared_bytes`: so many of it were not written when it was saved, but shared with the checkpoint of `shared_step`.
    """

    name: str
    bytes: int
    crc32: int
    kind: str = RANK
    rank: int = 0
    temporary: str = ""
    called: str = ""
    shared_bytes: int = dataclasses.field(default=0, compare=False)  # each node that has the file may share otherwise
    shared_step: int = dataclasses.field(default=0, compare=False)

    def to_message(self) -> dict[str, Any]:
        """For parse_files(); without what is empty. Of thousands of files `dataclasses.asdict` would take most of a commit."""
        said: dict[str, Any] = {
            "name": self.name,
            "bytes": self.bytes,
            "crc32": self.crc32,
            "kind": self.kind,
            "rank": self.rank,
        }
        if self.temporary:
            said["temporary"] = self.temporary
        if self.called:
            said["called"] = self.called
        if self.shared_bytes:
            said |= {"shared_bytes": self.shared_bytes, "shared_step": self.shared_step}
        return said


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`sequence` counts commits in the parent directory: the highest is the newest, whatever the steps.

    `others`: finished files that lay in the directory, without a manifest, before the step was saved to it: they are not ours.
    `bundle`: of a bundle on a node: the name of its directory at home; `moves_latest`: whether `latest` is to name it there.
    `metrics`: finite numbers by name, as they were given to save().
    `cost`: seconds by what they were spent for, of the rank that spent most: how long training had been held for the save by
    then ("blocked_s"), and how long after its beginning the files were durable ("flushed_s"). Nothing depends on that.
    """

    step: int
    sequence: int
    world_size: int
    files: tuple[FileEntry, ...]
    created: str = ""
    others: tuple[str, ...] = ()
    bundle: str = ""
    moves_latest: bool = True
    metrics: tuple[tuple[str, float], ...] = ()
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> bytes:
        with without_collector():
            return with_checksum(self._document())

    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "sequence": self.sequence,
            "world_size": self.world_size,
            "created": self.created or now(),
            "versions": {"torch": _torch_version()},
            "files": [file.to_message() for file in self.files],
        }
        if self.others:
            document["others"] = list(self.others)
        if self.bundle:
            document |= {"bundle": self.bundle, "moves_latest": self.moves_latest}
        if self.metrics:
            document["metrics"] = dict(self.metrics)
        if self.cost:
            document["cost"] = dict(self.cost)
        return document


def now() -> str:
    """For Manifest.created."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        NotACheckpointError: there is none, or it is not one; says why.
    """
    return read_with_content(directory)[0]


def read_with_content(directory: Path) -> tuple[Manifest, bytes]:
    """The same, and what it was made of: a moment later another one may have its name."""
    path = directory / NAME
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise NotACheckpointError(f"'{path}' is too large to be a manifest")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise NotACheckpointError(
            f"'{directory}' holds no {NAME}: it was not committed, or is being removed, or its manifest is lost"
        ) from error
    except OSError as error:
        raise NotACheckpointError(f"'{path}' cannot be read: {error}") from error
    try:
        return parse(content), content
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotACheckpointError(f"'{path}' cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise NotACheckpointError(f"'{path}' is not a valid manifest: {error}") from error


def _torch_version() -> str:
    """Imports no torch: a process that only copies checkpoints has none."""
    return str(sys.modules["torch"].__version__) if "torch" in sys.modules else _installed_torch()


@functools.cache
def _installed_torch() -> str:
    import importlib.metadata  # takes longer than all else here, and only who writes manifests needs it

    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def read_if_any(directory: Path) -> Manifest | None:
    """None if there is no valid one, whatever the reason."""
    try:
        return read(directory)
    except NotACheckpointError:
        return None


def stands(manifest: Manifest, directory: Path) -> bool:
    """Whether this very one is what the directory holds: a publication that ended in an error may have come so far."""
    return is_at(directory, manifest.sequence)


def is_at(directory: Path, sequence: int) -> bool:
    """Whether that commit is what the directory holds: it may have been removed, or replaced by a later one."""
    found = read_if_any(directory)
    return found is not None and found.sequence == sequence


def identity(manifest: Manifest) -> str:
    """Of the commit: the same on nodes and at home, where files may have other names; no two commits have the same, also if a
    line that was given up has used the same sequence number.
    """
    files = sorted((file.kind, file.rank, file.bytes, file.crc32) for file in manifest.files)
    said = [manifest.step, manifest.sequence, manifest.world_size, manifest.created, files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def with_checksum(document: Mapping[str, Any]) -> bytes:
    """What parse_checked() takes: a line for each field, and for each item of a list."""
    lines = [f" {json.dumps(key)}: {_in_lines(value)}" for key, value in {**document, "crc32": _checksum(document)}.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _in_lines(value: Any) -> str:
    """json.dumps(indent=1) would go through Python for each value: ten times slower."""
    text = json.dumps(value)
    if not isinstance(value, list) or not value:
        return text
    if text.count("}, {") == len(value) - 1 and all(isinstance(item, dict) for item in value):  # each ends one item
        return "[\n  " + text[1:-1].replace("}, {", "},\n  {") + "\n ]"
    return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"


def parse_checked(content: bytes) -> dict[str, Any]:
    """
    Raises:
        TypeError, ValueError, RecursionError: it is not what with_checksum() makes of a document of this format.
        KeyError: it does not say its format, or has no checksum.
    """
    document = json.loads(content)
    if not isinstance(document, dict):
        raise TypeError("it is not an object")
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']!r}; this version reads {FORMAT}")
    if document["crc32"] != _checksum(document):
        raise ValueError("it fails its own CRC-32")
    return document


def _checksum(document: Mapping[str, Any]) -> int:
    """CRC-32 of what the document says, however it is laid out."""
    said = {key: value for key, value in document.items() if key != "crc32"}
    return zlib.crc32(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())


class _Known:
    """What bytes have been found to mean, the newest of them: rank 0 reads the same manifests at each commit. For threads."""

    MOST_BYTES = 16 << 20  # of contents; what they mean takes some five times as much

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._manifests: collections.OrderedDict[bytes, Manifest] = collections.OrderedDict()  # guarded by _lock, as the next
        self._bytes = 0

    def find(self, content: bytes) -> Manifest | None:
        with self._lock:
            found = self._manifests.get(content)
            if found is not None:
                self._manifests.move_to_end(content)
            return found

    def note(self, content: bytes, manifest: Manifest) -> None:
        with self._lock:
            if content in self._manifests:
                return
            self._manifests[content] = manifest
            self._bytes += len(content)
            while self._bytes > self.MOST_BYTES:
                self._bytes -= len(self._manifests.popitem(last=False)[0])


_known = _Known()


def _forget_after_fork() -> None:
    """In a forked child: the lock may be held for ever."""
    global _known
    _known = _Known()


os.register_at_fork(after_in_child=_forget_after_fork)


def note_written(content: bytes, manifest: Manifest) -> None:
    """What was made of a manifest need not be parsed to know what it says, if it says all."""
    if manifest.created and (manifest.bundle or manifest.moves_latest):
        _known.note(content, manifest)


def parse(content: bytes) -> Manifest:
    """
    Raises:
        KeyError, TypeError, ValueError, RecursionError: it is no manifest.
    """
    manifest = _known.find(content)
    if manifest is None:
        manifest = _parse(content)
        _known.note(content, manifest)
    return manifest


def _parse(content: bytes) -> Manifest:
    document = parse_checked(content)
    files = document["files"]
    if not isinstance(files, list) or not files:
        raise ValueError("it lists no files")
    return Manifest(
        step=_count(document, "step"),
        sequence=_count(document, "sequence"),
        world_size=_count(document, "world_size"),
        files=parse_files(files),
        created=str(document.get("created", "")),
        others=tuple(_plain_name(name) for name in document.get("others", ())),
        bundle=_plain_name(document["bundle"]) if "bundle" in document else "",
        moves_latest=bool(document.get("moves_latest", True)),
        metrics=tuple((str(name), float(value)) for name, value in dict(document.get("metrics", {})).items()),
        cost=_cost(document.get("cost")),
    )


def _cost(said: Any) -> dict[str, float]:
    """Whatever is there: a checkpoint is no worse for what is said of its cost."""
    if not isinstance(said, dict):
        return {}
    return {str(key): float(value) for key, value in said.items() if isinstance(value, (int, float))}


def _parse_file(file: Any) -> FileEntry:
    name, temporary, called = _plain_name(file["name"]), file.get("temporary", ""), file.get("called", "")
    kind = file["kind"]
    if kind not in _KINDS:
        raise ValueError(f"the file '{name}' is of an unknown kind {kind!r}")
    if temporary:
        _plain_name(temporary)
    if called:
        _plain_name(called)
    shared = (_count(file, "shared_bytes"), _count(file, "shared_step")) if "shared_bytes" in file else (0, 0)
    return FileEntry(name, _count(file, "bytes"), _count(file, "crc32"), kind, _count(file, "rank"), temporary, called, *shared)


def is_plain_name(name: Any) -> bool:
    """Whether a manifest may give it."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def _plain_name(name: Any) -> str:
    if not is_plain_name(name):
        raise ValueError(f"the file name {name!r} is not a plain name")
    return str(name)


def parse_files(entries: Any) -> tuple[FileEntry, ...]:
    """From what FileEntry.to_message(), or `dataclasses.asdict`, made of them.

    Raises:
        KeyError, TypeError, ValueError: they are not.
    """
    return tuple(_parse_file(file) for file in entries)


def _count(fields: Any, key: str) -> int:
    value = fields[key]
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {value!r}, not a count")
    return value


def bytes_of(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files)


def names(files: Sequence[FileEntry]) -> set[str]:
    return {file.name for file in files}
