"""What a save costs of which a part is as it was: written anew, or shared with the checkpoint before (`Options.reuse`), and not
even read where save() is told what does not change (`frozen=`).

The file system must share blocks. Where that of the directory does not, root gets an XFS of its own, in an image.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

import ckpt
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, MIB, Samples, Settings, Side, Values, clock, column, interleave

KEEP = 2
ROUNDS = 7
PART_THAT_LEARNS = 64  # one of so many bytes, in the case of an adapter
PIECES = 4  # tensors of each kind
HOW = "clock from the call of Checkpointer.save() to the return of result(): a step with its manifest; an old one goes"
HOW_BYTES = "SaveStats: bytes_total - reused_bytes"
HOW_BLOCKED = "SaveStats: seconds in save() and at fences"


class Run:
    """Of one checkpointer, on a state of which all learns, or a part."""

    def __init__(self, directory: Path, nbytes: int, learning: float, *, reuse: bool, told: bool = False) -> None:
        self.checkpointer = ckpt.Checkpointer(directory, keep=KEEP, options=ckpt.Options(reuse=reuse, refresh_every=0))
        count = max(1, nbytes // 4 // PIECES)
        own = max(1, int(count * learning))
        self.learning = [torch.randn(own) for _ in range(PIECES)]
        self.state = {"learning": self.learning, "frozen": [torch.randn(count - own) for _ in range(PIECES)]}
        self.hint: list[torch.Tensor] | None = self.state["frozen"] if told else None  # given as frozen=
        self._steps = 0

    def save(self) -> Values:
        for tensor in self.learning:
            tensor.add_(1.0)
        self._steps += 1
        started = clock()
        pending = self.checkpointer.save(self._steps, self.state, lazy=True, frozen=self.hint)
        pending.result()
        seconds, stats = clock() - started, pending.stats
        written = float(stats.bytes_total - stats.reused_bytes)
        return {"durable_s": seconds, "blocked_s": stats.blocked_s, "written_bytes": written}


def shares_blocks(directory: Path) -> bool:
    """Found out by a try."""
    source, copy = directory / "source", directory / "copy"
    source.write_bytes(bytes(MIB))
    done = subprocess.run(["cp", "--reflink=always", source, copy], capture_output=True)
    source.unlink()
    copy.unlink(missing_ok=True)
    return done.returncode == 0


@contextlib.contextmanager
def sharing_place(directory: Path, nbytes: int) -> Iterator[Path]:
    """
    Raises:
        RuntimeError: there is none, and none can be made; says what it needs.
    """
    if shares_blocks(directory):
        yield directory
        return
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        raise RuntimeError(f"'{directory}' shares no blocks: give --directory on XFS or btrfs, or run as root with mkfs.xfs")
    image, place = directory / "image.xfs", directory / "xfs"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(nbytes)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def measure_reuse(settings: Settings, report: Report) -> None:
    nbytes = settings.sized(GIB)
    with settings.workspace() as directory, sharing_place(directory, max(GIB, 16 * nbytes)) as place:
        for case, learning in (("an adapter learns", 1 / PART_THAT_LEARNS), ("all learns", 1.0)):
            ways = {"frozen=": (True, True), "reuse": (True, False), "no reuse": (False, False)}
            if learning == 1.0:
                del ways["frozen="]
            runs = {
                f"{case}, {name}": Run(place / f"{case}-{name}".replace(" ", "-"), nbytes, learning, reuse=reuse, told=told)
                for name, (reuse, told) in ways.items()
            }
            sides = [Side(name, run.save) for name, run in runs.items()]
            with contextlib.ExitStack() as ends:
                for run in runs.values():
                    ends.enter_context(run.checkpointer)
                samples = interleave(sides, settings.rounds_or(ROUNDS), settings.settle, warmup=3)
            add_reuse(report, case, samples, nbytes)


class LinkingRun(Run):
    """The same where frozen tensors go to a file of their own, or all is written.

    Args:
        separate: the former.
    """

    def __init__(self, directory: Path, nbytes: int, learning: float, *, separate: bool) -> None:
        super().__init__(directory, nbytes, learning, reuse=False)
        self.checkpointer.close()
        options = ckpt.Options(reuse=False, refresh_every=0, frozen="separate" if separate else "together")
        self.checkpointer = ckpt.Checkpointer(directory, keep=KEEP, options=options)
        self.hint = self.state["frozen"]


def measure_frozen_files(settings: Settings, report: Report) -> None:
    """On the file system of the directory, whatever it is: nothing but hard links is asked of it."""
    nbytes, case = settings.sized(GIB), "an adapter learns, hard links"
    with settings.workspace() as place, contextlib.ExitStack() as ends:
        ways = (("separate", True), ("together", False))
        runs = {
            f"{case}, {name}": LinkingRun(place / name, nbytes, 1 / PART_THAT_LEARNS, separate=separate)
            for name, separate in ways
        }
        for run in runs.values():
            ends.enter_context(run.checkpointer)
        sides = [Side(name, run.save) for name, run in runs.items()]
        samples = interleave(sides, settings.rounds_or(ROUNDS), settings.settle, warmup=3)
    for name, found in samples.items():
        report.add("frozen-files", name, "s", column(found, "durable_s"), nbytes=nbytes, how=HOW)
        report.add("frozen-files", name, "s", column(found, "blocked_s"), nbytes=nbytes, how=HOW_BLOCKED)
        report.add("frozen-files", name, "bytes", column(found, "written_bytes"), nbytes=nbytes, how=HOW_BYTES)
    linked, written = (column(found, "durable_s") for found in samples.values())
    report.add_ratio("frozen-files", f"{case}: separate / together", linked, written, how="times of both", nbytes=nbytes)


def add_reuse(report: Report, case: str, samples: Samples, nbytes: int) -> None:
    for name, found in samples.items():
        report.add("reuse", name, "s", column(found, "durable_s"), nbytes=nbytes, how=HOW)
        report.add("reuse", name, "s", column(found, "blocked_s"), nbytes=nbytes, how=HOW_BLOCKED)
        report.add("reuse", name, "bytes", column(found, "written_bytes"), nbytes=nbytes, how=HOW_BYTES)
    durable = {name.rpartition(", ")[2]: column(found, "durable_s") for name, found in samples.items()}
    without = durable.pop("no reuse")
    for name, found in durable.items():
        bar = Bar("<=", 1 / 20) if name == "frozen=" else Bar("<=", 1.02) if case == "all learns" else None
        report.add_ratio("reuse", f"{case}: {name} / no reuse", found, without, how="times of both", nbytes=nbytes, bar=bar)
