"""The directory of one run on the disk of a node, as the ranks use that save there. What lies in it: ckpt/drain/node.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.directory import manifest as manifests
from ckpt.directory.keeping import Keeping
from ckpt.directory.step_names import is_step_name, names_in
from ckpt.drain.journal import FOLDER
from ckpt.drain.node import NAME, began_at
from ckpt.drain.waking import WAKE
from ckpt.errors import StorageError
from ckpt.storage import durable, free_space
from ckpt.storage.log_file import stamp_of, touch
from ckpt.tiers.tier import AUTO, Tier

PACE = "pace"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SPARE_BYTES = 1 << 20  # for what is small: manifests, receipts, journals


class Survey(NamedTuple):
    """What lies on a node.

    Attributes:
        highest_step_name: of a step directory, whatever is in it; empty if there is none.
        highest_sequence: that a manifest or a journal has; -1 if there is none.
    """

    highest_step_name: str
    highest_sequence: int


def identity(path: Path) -> str:
    """Of a directory, which is made if it is not there: ranks to which it says the same share the disk of a node.

    Raises:
        StorageError: it cannot be made.
    """
    durable.make_directory(path, durable=True)
    try:
        found = os.stat(path)
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot use '{path}': {error.strerror}", str(path)) from error
    return f"{boot()}:{found.st_dev:x}:{found.st_ino:x}"


def boot() -> str:
    """Names the machine from its start to its end; without /proc, the machine alone."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def this_process() -> dict[int, int]:
    """For NodeStorage.describe_node()."""
    began = began_at(os.getpid())
    return {} if began is None else {os.getpid(): began}


class NodeStorage:
    """
    Args:
        home: to which the checkpoints are carried.
        run: see run_id.py.

    Attributes:
        root: all of the run on this node.
    """

    def __init__(self, tier: Tier, home: Path, run: str) -> None:
        self.tier = tier
        self.home = Path(os.path.abspath(home))
        self.run = run
        self.root = tier.path / run
        self.pace = self.root / PACE
        self._sizes: dict[str, tuple[tuple[int, ...], int]] = {}  # of committed steps: stamp of the manifest, bytes

    def make(self) -> None:
        """
        Raises:
            StorageError: it cannot be made.
        """
        durable.make_directory(self.root / FOLDER, durable=True)

    def step_directory(self, name: str) -> Path:
        return self.root / name

    def survey(self) -> Survey:
        """
        Raises:
            StorageError: the directory cannot be read.
        """
        steps = {name for name in names_in(self.root) if is_step_name(name)}
        committed = (manifests.read_if_any(self.root / name) for name in steps)
        sequences = [manifest.sequence for manifest in committed if manifest is not None]
        sequences += [_number(name) for name in names_in(self.root / FOLDER)]
        return Survey(max(steps, default=""), max(sequences, default=-1))

    # ---- what the drain is told ------------------------------------------------------------------------------------

    def describe_node(
        self,
        node: int,
        nodes: int,
        world_size: int,
        ranks: Iterable[int],
        home_keeping: Keeping,
        direct_io: bool,
        pids: Mapping[int, int],
        home_every: Mapping[str, int | float] | None = None,
    ) -> bool:
        """Writes node.json durably, if it says something else; whether it did. make() was called.

        Args:
            ranks: of this node.
            home_keeping: which checkpoints stay at home.
            pids: of their processes, and when each began; see this_process().
            home_every: {"steps": n} or {"seconds": x}: what home wants beside the newest.

        Raises:
            StorageError: it cannot be written.
        """
        rate = self.tier.rate_bytes
        document: dict[str, Any] = {
            "format": manifests.FORMAT,
            "run": self.run,
            "home": str(self.home),
            "node": node,
            "nodes": nodes,
            "world_size": world_size,
            "ranks": sorted(ranks),
            "boot": boot(),
            "host": socket.gethostname(),
            "address": self.tier.address,
            "keep": self.tier.keep,
            "home_keep": home_keeping.newest,
            "home_keeps_too": home_keeping.to_json(),
            "home_every": None if home_every is None else dict(home_every),
            "rate": AUTO if rate is None else rate,
            "direct_io": direct_io,
            "pace": PACE,
            "pids": {str(pid): began for pid, began in sorted(pids.items())},
        }
        content, path = manifests.with_checksum(document), self.root / NAME
        try:
            if path.read_bytes() == content:
                return False
        except OSError:
            pass
        durable.remove_stale(path)
        durable.replace_durably(path, content, "node")
        return True

    def wake(self) -> None:
        """The drain looks at once. It looks each second anyway, so nothing depends on this."""
        touch(self.root / FOLDER / WAKE)

    # ---- room ------------------------------------------------------------------------------------------------------

    def has_room(self, needed: int, underway: Mapping[str, int] | None = None) -> bool:
        """Whether a save of so many bytes has room here, on the file system and in what the tier may hold.

        Args:
            needed: bytes that it writes on this node.
            underway: the bytes of saves that are being written, by the name of the step: they may not lie here yet.

        Raises:
            StorageError: the directory cannot be read.
        """
        held, missing = self._held(underway or {})
        limit = self.tier.limit_bytes
        if limit is not None and held + missing + needed > limit:
            return False
        return free_space.has_room(self.root, needed + missing + _SPARE_BYTES)

    def _held(self, underway: Mapping[str, int]) -> tuple[int, int]:
        """What lies here, and what of the saves that are being written does not yet."""
        known, self._sizes = self._sizes, {}
        held, loose = 0, dict.fromkeys(underway, 0)  # the latter: in steps that have no manifest
        for name in names_in(self.root):
            if name == FOLDER or not os.path.isdir(self.root / name):
                continue
            stamp = stamp_of(self.root / name / manifests.NAME)
            size = known[name][1] if stamp is not None and known.get(name, (None,))[0] == stamp else _size_of(self.root / name)
            if stamp is not None:
                self._sizes[name] = stamp, size
            elif name in loose:
                loose[name] = size
            held += size
        return held, sum(max(0, expected - loose[name]) for name, expected in underway.items())


def _number(journal: str) -> int:
    stem, suffix = os.path.splitext(journal)
    return int(stem) if suffix == ".json" and stem.isdecimal() else -1


def _size_of(directory: Path) -> int:
    """Of the files in it, as far as it can be told: some may be on their way out. Blocks that are reserved count."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                total += max(found.st_size, found.st_blocks * 512)
    except OSError:
        pass
    return total
