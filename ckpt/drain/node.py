"""What lies on a node: the description of the job, and the generations that are complete there.

node.json            whose it is, and where home is
step-000000000042/   as at home, and a receipt of each rank
drain/               the journals: see journal.py
.drain.lock          held by the one drainer
.restore.lock        held by a rank that restores
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory import sharded_files
from ckpt.directory.keeping import Keeping
from ckpt.directory.manifest import Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.directory.receipts import is_receipt
from ckpt.directory.step_names import is_step_name, names_in
from ckpt.errors import InUseError, NotACheckpointError
from ckpt.storage import durable, temporary_names
from ckpt.storage.directory_lock import DirectoryLock

logger = logging.getLogger("ckpt")

NAME = "node.json"
LOCK = ".drain.lock"
RESTORING = ".restore.lock"  # held while ranks of this node restore: nothing is removed meanwhile
DAMAGED = ".damaged"


@dataclasses.dataclass(frozen=True)
class Node:
    """
    Attributes:
        run: names the job, here and at home.
        place: of this node in the job that has saved here last.
        keep: how many committed steps stay here; None: all.
        home_keeping: which stay at home.
        every_steps, every_s: which generations home wants beside the newest; None: none.
        rate: bytes a second, or None for "auto".
        pids: of the processes that train, and when each began, in ticks since the boot.
        address: at which other nodes reach this one; None: the name of the host.
    """

    run: str
    home: Path
    place: NodePlace
    keep: int | None
    home_keeping: Keeping
    every_steps: int | None
    every_s: float | None
    rate: int | None
    direct_io: bool
    pace: str
    pids: Mapping[int, int]
    address: str | None = None

    def is_trained(self) -> bool:
        """Whether one of the processes lives that write here."""
        return any(began_at(pid) == began for pid, began in self.pids.items())


def read(root: Path) -> Node:
    """
    Raises:
        NotACheckpointError: it does not say what it should.
    """
    path = root / NAME
    try:
        said = manifests.parse_checked(path.read_bytes())
        every = said.get("home_every") or {}
        return Node(
            run=_plain(said["run"]),
            home=Path(said["home"]),
            place=NodePlace.parse({"number": said["node"], "count": said["nodes"], "ranks": said["ranks"]}),
            keep=_count_or_none(said["keep"]),
            home_keeping=Keeping.parse(_count_or_none(said["home_keep"]), said.get("home_keeps_too") or {}),
            every_steps=_count_or_none(every.get("steps")),
            every_s=None if every.get("seconds") is None else float(every["seconds"]),
            rate=None if said["rate"] == "auto" else int(said["rate"]),
            direct_io=bool(said["direct_io"]),
            pace=_plain(said["pace"]),
            pids={int(pid): int(began) for pid, began in said.get("pids", {}).items()},
            address=None if said.get("address") is None else str(said["address"]),
        )
    except OSError as error:
        raise NotACheckpointError(f"'{path}' cannot be read: {error.strerror}; give the directory of one run") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise NotACheckpointError(f"'{path}' does not describe a node: {error!r}") from error


def is_restored(root: Path) -> bool:
    """Whether somebody restores from this node."""
    try:
        DirectoryLock(root, name=RESTORING).expect_free(0.0)
    except InUseError:
        return True
    return False


def _plain(name: Any) -> str:
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", ".."):
        raise ValueError(f"{name!r} is not a plain name")
    return name


def _count_or_none(value: Any) -> int | None:
    if value is not None and int(value) < 1:
        raise ValueError(f"{value!r} is not a count")
    return None if value is None else int(value)


def began_at(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None if it is gone, or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


class Generation(NamedTuple):
    """A step that is complete on this node.

    Attributes:
        content, identity: the bytes of its manifest, and their CRC-32.
    """

    directory: Path
    manifest: Manifest
    content: bytes
    identity: int

    @property
    def sequence(self) -> int:
        return self.manifest.sequence


class Generations:
    """Of one node. Looked at again and again: a manifest that has not changed is not read again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[tuple[int, ...], Generation | None]] = {}

    def find(self) -> list[Generation]:
        """Newest first.

        Raises:
            StorageError: the directory cannot be read.
        """
        names = {name for name in names_in(self._root) if is_step_name(name)}
        self._known = {name: known for name in names if (known := self._look(name)) is not None}
        found = [generation for _, generation in self._known.values() if generation is not None]
        return sorted(found, key=lambda generation: generation.sequence, reverse=True)

    def _look(self, name: str) -> tuple[tuple[int, ...], Generation | None] | None:
        path, known = self._root / name / manifests.NAME, self._known.get(name)
        try:
            stat = os.stat(path)
            stamp = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if known is not None and known[0] == stamp:
                return known
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None  # not complete yet, or just going
        except OSError:
            return known  # it cannot be read just now
        try:
            return stamp, Generation(path.parent, manifests.parse(content), content, zlib.crc32(content))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            logger.warning("'%s' is not a valid manifest, and is not carried home: %s", path, error)
            return stamp, None


def still_there(generation: Generation) -> bool:
    """Whether its step was neither removed nor saved again."""
    try:
        return (generation.directory / manifests.NAME).read_bytes() == generation.content
    except OSError:
        return False


def quarantine(path: Path) -> None:
    """A file that is not what its manifest says: nobody is to read it, and whoever looks for the cause finds it.

    Raises:
        StorageError: it cannot be renamed.
    """
    durable.rename_durably(path, path.with_name(path.name + DAMAGED))


class NodeRetention:
    """Removes generations that are no longer wanted here. A removal that fails is told once, and is tried again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._warned: set[Path] = set()

    def remove_retired(self) -> None:
        """What an end has left half-removed."""
        with contextlib.suppress(OSError):
            for path in list(self._root.iterdir()):
                behind = temporary_names.name_behind(path.name)
                if behind is not None and is_step_name(behind):
                    self._remove(path)

    def retire(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            if _is_being_written(generation):
                continue
            try:
                retired = durable.retire_directory(generation.directory)
                durable.sync_directory(self._root)
            except OSError as error:
                self._warn(generation.directory, error)
                continue
            durable.crash_point("drain-retired")
            self._remove(retired)

    def _remove(self, path: Path) -> None:
        try:
            durable.remove_tree(path)
        except OSError as error:
            self._warn(path, error)

    def _warn(self, path: Path, error: OSError) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("removing '%s' failed, all checkpoints are good: %s", path, error)


def _is_being_written(generation: Generation) -> bool:
    """Whether the step is just being saved again: files lie there that its manifest does not name, and that are newer."""
    named = sharded_files.names_of(generation.manifest) | {manifests.NAME, *generation.manifest.others}
    try:
        committed = os.stat(generation.directory / manifests.NAME).st_mtime_ns
        others = [name for name in names_in(generation.directory) - named if not (is_receipt(name) or name.endswith(DAMAGED))]
        return any(os.stat(generation.directory / name).st_mtime_ns >= committed for name in others)
    except OSError:
        return True
