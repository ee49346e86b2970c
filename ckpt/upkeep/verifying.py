"""Whether the bytes of checkpoints are those that were written."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt import _native
from ckpt.directory import late_names, receipts
from ckpt.directory import manifest as manifests
from ckpt.directory.damage import have_common_blocks, roles_of, where_damaged
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.sharded_files import METADATA, metadata_name, needs_mending
from ckpt.directory.step_names import names_in
from ckpt.drain import node as nodes
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError, StorageError
from ckpt.storage.watching import watched
from ckpt.upkeep import dcp_metadata
from ckpt.upkeep.census import is_checkpoint, look, none_at
from ckpt.upkeep.contents import read_contents
from ckpt.upkeep.rows import COMMITTED, DAMAGED, is_hidden, size_below
from ckpt.upkeep.showing import place_of
from ckpt.upkeep.zip_check import first_bad_record, has_checksums

GOOD, BAD, MISSING, UNKNOWN, ELSEWHERE = "good", "damaged", "missing", "not verifiable", "on another node"
_THREADS = 8
_TIMEOUT_S = 24 * 3600.0
_LARGEST_PART = 1 << 33  # of a file of torch.distributed.checkpoint, which is read as a whole

_LARGE = 64 << 20  # bytes of a file that is told of while it is read: that takes a thread

Told = Callable[[int], object]  # called with numbers of bytes that are done; of each file their sum is its size


class _Count:
    """Of the bytes of one file: all of them are told, once it has been looked at."""

    def __init__(self, told: Told, size: int) -> None:
        self._told = told
        self._size = size
        self._done = 0

    def reach(self, done: int) -> None:
        """So many of them are done."""
        more = min(done, self._size) - self._done
        if more > 0:
            self._done += more
            self._told(more)

    def finish(self) -> None:
        self.reach(self._size)

    @contextlib.contextmanager
    def reading(self, file: _native.RangeFile | _native.RecordFile) -> Iterator[None]:
        """All of it is read meanwhile."""
        with contextlib.nullcontext() if file.size < _LARGE else watched(lambda: file.bytes_read, self.reach):
            yield


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On one file.

    Attributes:
        checkpoint: its path; of a single file, that of the file.
        file: its name; empty: all of the checkpoint.
        state: one of the above.
        problem: which record or bytes are wrong, or why nothing could be verified.
        same_blocks: other checkpoints beside it, whose files have the damaged bytes in the same blocks of the disk.
    """

    checkpoint: str
    file: str
    bytes: int
    state: str
    problem: str = ""
    same_blocks: tuple[str, ...] = ()


def find_checkpoints(path: Path) -> list[Path]:
    """A checkpoint, or all of a directory that are committed or damaged; or a file.

    Raises:
        NotACheckpointError: there is none.
        StorageError: it cannot be read.
    """
    if not path.is_dir() or is_checkpoint(path):
        if not os.path.lexists(path):
            raise NotACheckpointError(f"'{path}' does not exist")
        return [path]
    rows = [row for row in look(path) if row.state in (COMMITTED, DAMAGED) or (path / row.name / METADATA).exists()]
    if not rows:
        raise none_at(path, "no checkpoint")
    named = [(path / row.name, late_names.partial_of(path, row.name)) for row in rows]
    return [partial if os.path.lexists(partial / manifests.NAME) else own for own, partial in named]


def verify(path: Path, fast: bool, told: Told = lambda _: None) -> Iterator[Verdict]:
    """What is to be said of a checkpoint or a file; the verdict on each file comes when it has been read.

    Args:
        fast: only manifests, headers and sizes.
    """
    if not path.is_dir():
        yield _verify_alone(path, fast, told)
        return
    if not os.path.lexists(path / manifests.NAME):
        yield from _verify_foreign(path, fast, told)
        return
    try:
        manifest = manifests.read(path)
    except NotACheckpointError as error:
        yield Verdict(str(path), manifests.NAME, 0, BAD, str(error))
        return
    for file in manifest.files:
        done = _Count(told, file.bytes)
        state, problem, where = _judge(path, file, manifest, fast, done)
        others = _with_same_blocks(path, file, manifest, where) if where else ()
        if others:
            problem += f"; these have the same blocks there, and so the same damage: {', '.join(others)}"
        elif state == BAD and file.shared_bytes:
            problem += f"; {file.shared_bytes} bytes of it were shared with step {file.shared_step}: look at that, too"
        done.finish()
        yield Verdict(str(path), file.name, file.bytes, state, problem, others)
    yield from _verify_copy(path, manifest)


def _verify_copy(path: Path, manifest: Manifest) -> Iterator[Verdict]:
    """Of metadata of a step that was saved again: readers of torch know only this name."""
    name = metadata_name(manifest)
    if name is None or name == METADATA:
        return
    try:
        if needs_mending(path, manifest):
            size = next(file.bytes for file in manifest.files if file.name == name)
            yield Verdict(
                str(path), METADATA, size, BAD, f"it is not '{name}', which the step has: `ckpt repair` makes it that"
            )
    except OSError as error:
        yield Verdict(str(path), METADATA, 0, BAD, f"cannot be read: {error.strerror}")


def _with_same_blocks(directory: Path, file: FileEntry, manifest: Manifest, where: tuple[int, int]) -> tuple[str, ...]:
    """Names of checkpoints beside this one: what they say of themselves may be from before others of them were removed."""
    role = next(role for role, each in roles_of(manifest.files).items() if each == file)
    path, found = place_of(directory, file), []
    for name in sorted(names_in(directory.parent)):
        other = directory.parent / name
        theirs = None if name == directory.name or is_hidden(name) else manifests.read_if_any(other)
        match = None if theirs is None else roles_of(theirs.files).get(role)
        if match is not None and have_common_blocks(path, place_of(other, match), *where):
            found.append(name)
    return tuple(found)


def judge(directory: Path, file: FileEntry, manifest: Manifest, fast: bool) -> tuple[str, str]:
    """State and problem of a file that a manifest names: see Verdict."""
    return _judge(directory, file, manifest, fast, _Count(lambda _: None, file.bytes))[:2]


def _judge(
    directory: Path, file: FileEntry, manifest: Manifest, fast: bool, done: _Count
) -> tuple[str, str, tuple[int, int] | None]:
    """Also which bytes are wrong, or cannot be read, if that can be told."""
    path = place_of(directory, file)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        elsewhere = _is_elsewhere(directory, file, manifest)
        return (ELSEWHERE, "", None) if elsewhere else (MISSING, "it is not there", None)
    except OSError as error:
        return BAD, f"cannot be read: {error.strerror}", None
    if size != file.bytes:
        return BAD, f"has {size} bytes where its manifest says {file.bytes}", None
    if fast:
        return GOOD, "", None
    try:
        found = _digest(path, done)
    except (CheckpointError, OSError) as error:
        return BAD, str(error), getattr(error, "bytes_at", None)
    if found == file.crc32:
        return GOOD, "", None
    where = where_damaged(path)
    if where is None:
        return BAD, f"has the CRC-32 {found:08x} where its manifest says {file.crc32:08x}", None
    return BAD, str(where), getattr(where, "bytes_at", None)


def _digest(path: Path, done: _Count) -> int:
    file = _native.RangeFile(os.fsencode(path), True)
    with done.reading(file):
        return file.read([(0, file.size, 0, -1)], threads=_THREADS, timeout_s=_TIMEOUT_S, keep=None)[0]


def _is_elsewhere(directory: Path, file: FileEntry, manifest: Manifest) -> bool:
    if not os.path.lexists(directory.parent / nodes.NAME):
        return False
    place = receipts.place_in(directory, manifest)
    return place is not None and not place.holds(file)


def _verify_alone(path: Path, fast: bool, told: Told) -> Verdict:
    """A file that no manifest names: what it carries itself is all there is."""
    size, done = 0, _Count(told, 0)
    try:
        size = path.stat().st_size
        done = _Count(told, size)
        contents = read_contents(path)
        if not fast and contents.checksummed and contents.format == "torch":
            file = _native.RecordFile(os.fsencode(path), True, _THREADS, _TIMEOUT_S)
            with done.reading(file):
                file.read([], whole=True, threads=_THREADS, timeout_s=_TIMEOUT_S)
    except CorruptError as error:
        return Verdict(str(path), path.name, size, BAD, str(error))
    except FileNotFoundError:
        return Verdict(str(path), path.name, 0, MISSING, "it is not there")
    except (StorageError, OSError) as error:
        return Verdict(str(path), path.name, size, BAD, str(error))
    finally:
        done.finish()
    if contents.beside and not os.path.lexists(path.parent / contents.beside):
        text = f"its frozen tensors are missing: they were in '{contents.beside}', which belongs beside it"
        return Verdict(str(path), path.name, size, BAD, text)
    if contents.checksummed or fast:
        return Verdict(str(path), path.name, size, GOOD)
    return Verdict(str(path), path.name, size, UNKNOWN, f"a file of this format ({contents.format}) has no checksums")


# ---- what torch.distributed.checkpoint has written --------------------------------------------------------------------


def _verify_foreign(directory: Path, fast: bool, told: Told) -> Iterator[Verdict]:
    """By the checksums of the archives in its files."""
    try:
        layout = dcp_metadata.parse((directory / METADATA).read_bytes())
    except (CorruptError, OSError) as error:
        yield Verdict(str(directory), METADATA, 0, BAD, str(error))
        return
    parts: dict[str, list[tuple[int, int, str]]] = {name: [] for name in layout.file_names}
    for stored in layout.stored:
        for part in stored.parts:
            parts[part.file].append((part.at, part.length, stored.key))
    for name, found in parts.items():
        end = max((at + length for at, length, _ in found), default=0)
        done = _Count(told, _size_of(directory / name))
        state, problem, size = _judge_parts(directory / name, sorted(found), end, fast, done)
        done.finish()
        yield Verdict(str(directory), name, size, state, problem)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _judge_parts(path: Path, parts: list[tuple[int, int, str]], end: int, fast: bool, done: _Count) -> tuple[str, str, int]:
    try:
        size = path.stat().st_size
        if size < end:
            return BAD, f"has {size} bytes where {METADATA} speaks of {end}", size
        if fast:
            return GOOD, "", size
        verdict = GOOD, ""
        with open(path, "rb") as file:
            for at, length, key in parts:
                problem = _judge_part(file, at, length)
                if problem and verdict[0] == GOOD:
                    verdict = problem[0], f"'{key}', at byte {at}: {problem[1]}"
                if problem and problem[0] == BAD:
                    return BAD, f"'{key}', at byte {at}: {problem[1]}", size
                done.reach(at + length)
    except FileNotFoundError:
        return MISSING, "it is not there", 0
    except OSError as error:
        return BAD, f"cannot be read: {error.strerror}", 0
    return *verdict, size


def _judge_part(file: io.BufferedReader, at: int, length: int) -> tuple[str, str] | None:
    """None if all is well with it."""
    if length > _LARGEST_PART:
        return UNKNOWN, f"its {length} bytes are more than can be verified at once"
    file.seek(at)
    content = file.read(length)
    try:
        record = first_bad_record(content)
        if record is not None and not has_checksums(content):
            return UNKNOWN, "it has no checksums"
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        return BAD, f"its archive is damaged: {error}"
    return None if record is None else (BAD, f"its record '{record}' fails its CRC-32")


def total_bytes(paths: list[Path]) -> int:
    """Of the files that are to be read, about; for who shows how far it has come."""
    total = 0
    for path in paths:
        if (manifest := manifests.read_if_any(path)) is not None:
            total += manifests.bytes_of(manifest)
        else:
            total += size_below(path)[0] if path.is_dir() else os.stat(path).st_size
    return total
