"""What a job would leave on the disks of its nodes, and the drain as a process of its own."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from nursery import Ended, Nursery
from places import PYTHONPATH

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.directory.step_names import free_name, names_in, step_name
from ckpt.drain import journal as journals
from ckpt.drain import node as nodes

RUN = "run-1"
MiB = 1 << 20
DEADLINE_S = patience(60.0)

Metrics = tuple[tuple[str, float], ...]


@dataclasses.dataclass
class Saved:
    """A generation: its manifest, and what is in its files."""

    manifest: Manifest
    content: dict[str, bytes]


class Job:
    """A job of one rank for each node. It saves as the ranks would, but nothing of it runs.

    Args:
        settings: what differs in node.json from what is usual.
    """

    def __init__(self, base: Path, nodes: int = 1, home: Path | None = None, **settings: Any) -> None:
        self.home = home or base / "home"
        self.home.mkdir(exist_ok=True)
        (self.home / ".run").write_text(json.dumps({"run": RUN}))
        self.roots = [base / f"node{number}" / RUN for number in range(nodes)]
        self.saved: dict[int, Saved] = {}  # by sequence
        self.sequence = 0
        for number, root in enumerate(self.roots):
            (root / "drain").mkdir(parents=True, exist_ok=True)
            self.describe(number, **settings)

    def describe(self, node: int, /, **settings: Any) -> None:
        document = {
            **{"format": 1, "run": RUN, "home": str(self.home), "node": node, "nodes": len(self.roots)},
            **{"world_size": len(self.roots), "ranks": [node], "keep": 2, "home_keep": None, "rate": 10**12},
            **{"direct_io": True, "pace": "pace", **settings},
        }
        path = self.roots[node] / nodes.NAME
        path.with_suffix(".new").write_bytes(manifests.with_checksum(document))
        path.with_suffix(".new").rename(path)

    def save(self, step: int, size: int = 200_000, common: int = 0, created: str = "", metrics: Metrics = ()) -> Saved:
        """Makes a generation complete on all nodes; a step that is there is saved again, as a job does.

        Args:
            size: of the file of each rank, in bytes; about.
            common: of replicated.pt; 0: there is none.
        """
        rng = random.Random(self.sequence)
        taken = {name for root in self.roots for name in names_in(root / step_name(step))}
        stems = [f"rank-{rank:05d}" for rank in range(len(self.roots))] + ["replicated"] * bool(common)
        names = [free_name(stem, taken) for stem in stems]
        content = {name: rng.randbytes(common if "repl" in name else size + 17 * number) for number, name in enumerate(names)}
        return self.place(step, content, created, metrics)

    def place(self, step: int, content: dict[str, bytes], created: str = "", metrics: Metrics = ()) -> Saved:
        self.sequence += 1
        files = []
        for name, held in content.items():
            kind = REPLICATED if name.startswith("replicated") else RANK
            rank = 0 if kind == REPLICATED or name.startswith("state") else int(name[5:10])
            files.append(FileEntry(name, len(held), zlib.crc32(held), kind, rank))
        created = created or f"2026-01-01T00:00:{self.sequence:02d}+00:00"
        manifest = Manifest(step, self.sequence, len(self.roots), tuple(files), created, metrics=metrics)
        for number, root in enumerate(self.roots):
            directory = root / step_name(step)
            directory.mkdir(exist_ok=True)
            before = manifests.read_if_any(directory)
            for entry in manifest.files:
                if entry.kind == REPLICATED or entry.rank == number:
                    (directory / entry.name).write_bytes(content[entry.name])
            self._write_receipt(directory, number, manifest)
            (directory / ".tmp-m").write_bytes(manifest.to_json())
            (directory / ".tmp-m").rename(directory / manifests.NAME)
            for name in manifests.names(before.files) if before else ():
                (directory / name).unlink(missing_ok=True)
            (root / "drain" / "wake").touch()
        self.saved[manifest.sequence] = Saved(manifest, content)
        return self.saved[manifest.sequence]

    def forget_old(self) -> None:
        """Of saves long ago that lie nowhere any more. Hundreds of them would fill the memory of a small machine."""
        found = (manifests.read_if_any(path) for place in (self.home, *self.roots) for path in place.glob("step-*"))
        there = {manifest.sequence for manifest in found if manifest is not None}
        for sequence in sorted(self.saved)[:-50]:
            if sequence not in there:
                del self.saved[sequence]

    def _write_receipt(self, directory: Path, node: int, manifest: Manifest) -> None:
        place = NodePlace(node, len(self.roots), (node,))
        files = [dataclasses.asdict(entry) for entry in manifest.files if place.holds(entry)]
        said = {"format": 1, "rank": node, "token": "", "files": files, "place": dataclasses.asdict(place)}
        if files:
            (directory / f"receipt-{node:05d}.json").write_bytes(manifests.with_checksum(said))

    # ---- looking ---------------------------------------------------------------------------------------------------

    def journal(self, sequence: int, node: int = 0) -> journals.Journal | None:
        return journals.read(journals.path_of(self.roots[node], sequence))

    def state(self, sequence: int, node: int = 0) -> str:
        journal = self.journal(sequence, node)
        return "" if journal is None else journal.state

    def steps_on(self, node: int = 0) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.roots[node].glob("step-*"))

    def steps_at_home(self) -> list[int]:
        return sorted(self.manifests_at_home())

    def manifests_at_home(self) -> dict[int, Manifest]:
        found = (manifests.read_if_any(path) for path in self.home.glob("step-*"))
        return {manifest.step: manifest for manifest in found if manifest is not None}

    def assert_home_is_right(self) -> None:
        """All that is committed there is, byte for byte, what was saved under its number; `latest` is the newest."""
        found = self.manifests_at_home()
        for manifest in found.values():
            saved = self.saved[manifest.sequence]
            assert (manifest.step, manifest.created) == (saved.manifest.step, saved.manifest.created)
            assert len(manifest.files) == len(saved.manifest.files)
            for here, there in zip(manifest.files, saved.manifest.files, strict=True):
                assert dataclasses.replace(here, name="") == dataclasses.replace(there, name="")
                path = self.home / step_name(manifest.step) / here.name
                assert path.read_bytes() == saved.content[there.name], f"{path} is not what was saved"
        latest = self.home / "latest"
        if latest.exists():
            assert int(latest.read_text().strip()[5:]) in found

    def assert_home_is_tidy(self) -> None:
        """Nothing is there but whole checkpoints."""
        newest = max(self.manifests_at_home().values(), key=lambda manifest: manifest.sequence)
        assert (self.home / "latest").read_text().strip() == step_name(newest.step)
        for path in self.home.glob("step-*"):
            manifest = manifests.read(path)
            assert names_in(path) == {manifests.NAME, *manifests.names(manifest.files)}
        assert [path.name for path in (self.home / ".drain" / RUN).iterdir()] == []
        assert {path.name for path in self.home.iterdir() if not path.name.startswith("step-")} == {".run", ".drain", "latest"}


# ---- the process -----------------------------------------------------------------------------------------------------

# Beside other tests it would wait for them. run_program() starts one that gives way.
_DOES_NOT_GIVE_WAY = "from ckpt.cli import drain; drain._give_way_to_training = lambda: None"

_idle: list[Nursery] = []  # each has one child at a time; there are as many as drains that ran side by side


@atexit.register
def _end_nurseries() -> None:
    while _idle:
        _idle.pop().__exit__()


class Drain:
    """One process, from start to wait(). A context manager, which ends it.

    Args:
        prepare: Python that it runs before.
    """

    def __init__(self, root: Path, arguments: Sequence[str], prepare: str = "pass") -> None:
        self._nursery = _idle.pop() if _idle else Nursery(drain=True)
        self._child = self._nursery.start(_program(f"{_DOES_NOT_GIVE_WAY}; {prepare}"), "drain", str(root), *arguments)
        self._ended: Ended | None = None
        self.pid = self._child.pid

    @property
    def runs(self) -> bool:
        return self._ended is None and not self._child.ends_within(0)

    def wait(self) -> Ended:
        if self._ended is None:
            self._ended = self._child.wait()
            _idle.append(self._nursery)
        return self._ended

    def kill_after(self, delay_s: float) -> Ended:
        self._child.kill_after(delay_s)
        return self.wait()

    def signal(self, number: int) -> None:
        self._child.signal(number)

    @property
    def is_held(self) -> bool:
        """At the point of hold_at()."""
        return self.runs and Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def __enter__(self) -> Drain:
        return self

    def __exit__(self, *_: object) -> None:
        if self.runs:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)
        self.wait()


def _program(prepare: str) -> str:
    return f"import sys; from ckpt import _native; {prepare}; from ckpt.cli.main import main; sys.exit(main())"


def run_program(root: Path, *arguments: str, prepare: str = "") -> Ended:
    """As a user starts it: with an interpreter of its own."""
    command = [sys.executable, *(["-c", _program(prepare)] if prepare else ["-m", "ckpt"]), "drain", str(root), *arguments]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    return Ended(done.returncode, done.stdout, done.stderr)


def drain_once(root: Path, *arguments: str, prepare: str = "pass") -> Ended:
    return Drain(root, ["--once", *arguments], prepare).wait()


def drain_well(root: Path, *arguments: str) -> None:
    ended = drain_once(root, *arguments)
    assert ended.returncode == 0, ended.stderr


def crash_at(point: str, skip: int = 0) -> str:
    return f"_native.set_crash_point({point!r}, {skip})"


def hold_at(point: str) -> str:
    """It stops there once, until it gets SIGCONT."""
    return f"import holding; holding.hold_at({point!r})"


TRIES_SOON = "from ckpt.drain import backoff; backoff._SHORTEST_S = 0.02"


def fault(call: str, error: int, part: str = "", **more: Any) -> str:
    settings: Mapping[str, Any] = {"error": error, **more}
    return f"_native.set_fault({call!r}, {part!r}, **{settings!r})"


def wait_for(condition: Callable[[], bool], drain: Drain | None = None) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        assert drain is None or drain.runs, drain.wait().stderr
        time.sleep(0.01)


def this_process() -> dict[str, int | None]:
    """For node.json: somebody trains."""
    return {str(os.getpid()): nodes.began_at(os.getpid())}


@contextmanager
def that_cannot_be_changed(directory: Path) -> Iterator[None]:
    """Not even by root, whom permissions do not hold back."""
    if subprocess.run(["chattr", "+i", str(directory)], capture_output=True).returncode != 0:
        pytest.skip("needs chattr +i, which not all users and file systems have")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(directory)], check=True)
