"""What a job leaves at home, and the drain that carries it to an object store, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from node_roots import Drain
from nursery import Ended
from object_server import options_for

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import RANK, FileEntry, Manifest
from ckpt.directory.step_names import step_name
from ckpt.drain import journal as journals
from ckpt.drain import remote_place
from ckpt.drain.remote_place import Remote, place_of
from ckpt.remote.layout import Catalogue, RemoteCopy
from ckpt.storage.object_store import ObjectStore
from ckpt.tiers.drain_process import DrainProcess

MiB = 1 << 20
_SMALL_PARTS = "from ckpt.storage import object_store; object_store._PART_BYTES = 1 << 20"


class RemoteJob:
    """A job whose checkpoints come home, but nothing of it runs.

    Args:
        settings: what differs in remote.json from what is usual.
    """

    def __init__(self, base: Path, bucket: str, port: int, home: str = "home", **settings: Any) -> None:
        self.home = base / home
        self.url = f"s3://{bucket}/run1"
        self.options = options_for(port)
        self.place = place_of(self.home, self.url)
        (self.place / "drain").mkdir(parents=True)
        self.store = ObjectStore(self.url, self.options)
        self.content: dict[int, dict[str, bytes]] = {}  # by sequence
        self.describe(**settings)

    def describe(self, **settings: Any) -> None:
        usual: dict[str, Any] = {
            **{"url": self.url, "home": self.home, "owner": f"owner-{self.home.name}", "instead_of": "", "ticket": ""},
            **{"keep": None, "every_steps": None, "every_s": None, "rate": 10**12, "direct_io": True},
            **{"pace": self.place / "pace", "pids": {}, "options": self.options},
        }
        remote_place.write(self.place, Remote(**{**usual, **settings}))

    def save(self, step: int, *sizes: int) -> int:
        """At home; returns its sequence. A step that is there is saved again."""
        sequence = len(self.content) + 1
        rng = random.Random(sequence)
        directory = self.home / step_name(step)
        directory.mkdir(exist_ok=True)
        content = {f"rank-{rank:05d}-{sequence}.pt": rng.randbytes(size) for rank, size in enumerate(sizes or (100_000, 77))}
        entries = [FileEntry(name, len(held), zlib.crc32(held), RANK, int(name[5:10])) for name, held in content.items()]
        for name, held in content.items():
            (directory / name).write_bytes(held)
        created = f"2026-01-{1 + sequence // 24:02d}T{sequence % 24:02d}:00:00+00:00"
        manifest = Manifest(step, sequence, len(entries), tuple(entries), created)
        (directory / ".new").write_bytes(manifest.to_json())
        (directory / ".new").rename(directory / manifests.NAME)
        self.content[sequence] = content
        return sequence

    # ---- the drain -------------------------------------------------------------------------------------------------

    def start(self, *arguments: str, prepare: str = "pass") -> Drain:
        return Drain(self.place, arguments, f"{_SMALL_PARTS}; {prepare}")

    def drain(self, prepare: str = "pass") -> Ended:
        """Until nothing is left that can be done now."""
        return self.start("--once", prepare=prepare).wait()

    def drain_well(self) -> None:
        ended = self.drain()
        assert ended.returncode == 0, ended.stderr

    # ---- looking ---------------------------------------------------------------------------------------------------

    def journal(self, sequence: int) -> journals.Journal | None:
        return journals.read(journals.path_of(self.place, sequence))

    def state(self, sequence: int) -> str:
        journal = self.journal(sequence)
        return "" if journal is None else journal.state

    def copies(self) -> list[RemoteCopy]:
        return Catalogue(self.store).find().copies

    def sequences(self) -> list[int]:
        """Of what is in the store, newest first."""
        return [copy.sequence for copy in self.copies()]

    def keys_there(self) -> list[str]:
        return [each.key for each in self.store.list("")]

    def assert_store_is_right(self) -> None:
        """All that is committed there is, byte for byte, what was saved under its number."""
        for copy in self.copies():
            saved = self.content[copy.sequence]
            assert {file.name for file in copy.manifest.files} == saved.keys()
            found = {name: read(self.store, f"{copy.folder}/{name}") for name in saved}
            assert found == saved

    def assert_store_is_tidy(self) -> None:
        """Nothing is there but whole checkpoints, and `latest` is the newest."""
        copies = self.copies()
        expected = {f"{copy.folder}/{file.name}" for copy in copies for file in copy.manifest.files}
        expected |= {f"{copy.folder}/manifest.json" for copy in copies}
        assert {*self.keys_there()} == expected | {"latest", "run.json"}
        assert read(self.store, "latest").decode() == f"{copies[0].folder}\n"


def end_drains(base: Path) -> None:
    """Of all homes and nodes below a directory: their trainer lives on."""
    for lock in [*base.glob("*/.remote/*/.drain.lock"), *base.glob("*/*/.drain.lock")]:
        drain = DrainProcess(lock.parent)
        while drain.runs():
            signed = re.match(r"process (\d+) on ", lock.read_text())
            if signed is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(signed[1]), signal.SIGKILL)
            time.sleep(0.01)


def read(store: ObjectStore, key: str) -> bytes:
    with store.open(key) as file:
        return file.read()


def sent_files(requests: Any, names: Mapping[str, bytes]) -> list[str]:
    """Those of these files that were put, in one piece or in parts."""
    put = [request.path.partition("?")[0] for request in requests if request.method in ("PUT", "POST")]
    return sorted({name for name in names if any(path.endswith(f"/{name}") for path in put)})
