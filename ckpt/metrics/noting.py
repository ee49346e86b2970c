"""What happens to checkpoints, as numbers: which instruments a save, a commit, a restore and a drain move."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Mapping

from ckpt.metrics.record import Outcome
from ckpt.metrics.registry import PROCESS, Registry
from ckpt.metrics.stats import SaveStats

HOME, NODE, PEER, OBJECT = "home", "node", "peer", "object"  # the attribute "tier": peer is the disk of another node


def note_save(outcome: Outcome, stats: SaveStats, registry: Registry = PROCESS) -> None:
    """One has ended, whatever came of it."""
    registry.add("ckpt.save.count", outcome=outcome)
    for where, seconds in (("save", stats.save_s), ("fence", stats.fence_s), ("arena", stats.arena_wait_s)):
        registry.add("ckpt.save.blocked.time", seconds, where=where)
    registry.observe("ckpt.save.duration", stats.blocked_s, phase="blocked")
    if outcome != "committed":
        return
    commit_s = None if stats.durable_s is None or stats.flushed_s is None else stats.durable_s - stats.flushed_s
    phases = {"capture": stats.captured_s, "flush": stats.flushed_s, "commit": commit_s, "durable": stats.durable_s}
    for phase, seconds_or_none in phases.items():
        if seconds_or_none is not None:
            registry.observe("ckpt.save.duration", seconds_or_none, phase=phase)
    registry.observe("ckpt.save.size", stats.bytes_total)
    if stats.reused_bytes:
        registry.add("ckpt.save.reused", stats.reused_bytes)
    for source, count in _sources(stats).items():
        if count:
            registry.add("ckpt.io", count, direction="write", source=source, tier=landed_on(stats))


def _sources(stats: SaveStats) -> dict[str, int]:
    """From where the bytes of its files were written; they add up to these, without those that were not written."""
    rest = max(0, stats.bytes_total - stats.unread_bytes - stats.bytes_from_tensors - stats.bytes_from_devices)
    found = {"tensor": stats.bytes_from_tensors, "device": stats.bytes_from_devices, "arena": rest}
    left = stats.reused_bytes - stats.unread_bytes
    for source, count in found.items():  # most of what is reused is large, and was left in its tensor
        found[source] = max(0, count - left)
        left = max(0, left - count)
    return found


def landed_on(stats: SaveStats) -> str:
    """The tier to which its process has written it."""
    at = stats.tier_at.get(NODE)
    went_past = at is None or (stats.durable_at is not None and at >= stats.durable_at)
    return HOME if went_past else NODE


def note_commit(tier: str, step: int | None, registry: Registry = PROCESS) -> None:
    """A checkpoint has come to a tier just now."""
    registry.set("ckpt.committed.timestamp", time.time(), tier=tier)
    if step is not None:
        registry.set("ckpt.committed.step", step, tier=tier)


def note_free(tier: str, free_bytes: int | None, registry: Registry = PROCESS) -> None:
    """
    Args:
        free_bytes: None if that cannot be told.
    """
    if free_bytes is not None:
        registry.set("ckpt.tier.free", free_bytes, tier=tier)


@dataclasses.dataclass
class RestoreFigures:
    """What a restore has cost this rank.

    Attributes:
        name: of the directory of what was restored; empty: nothing was.
        read_s: seconds in which it was read and verified, with all that was passed over; load_s: in which it was made of that.
        total_s: with the time in which the ranks agreed upon it.
        tried: checkpoints that were read; all but the one that was restored were found bad, on this rank or another.
        read_bytes: by tier.
        failures: files, or whole checkpoints, that were not what was written: tier, name and cause of each.
    """

    name: str = ""
    step: int | None = None
    sequence: int | None = None
    read_s: float = 0.0
    load_s: float = 0.0
    total_s: float = 0.0
    tried: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    read_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    failures: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def note_found(self, name: str, step: int, sequence: int) -> None:
        self.name, self.step, self.sequence = name, step, sequence

    @property
    def choose_s(self) -> float:
        return max(0.0, self.total_s - self.read_s - self.load_s)

    @property
    def tier(self) -> str:
        """The farthest from which anything was read."""
        return next((tier for tier in (OBJECT, HOME, PEER, NODE) if tier in self.read_bytes), "")

    @property
    def outcome(self) -> str:
        """Of one that has not failed."""
        return "fell_back" if self.tried - {(self.name, self.sequence)} else "ok"


def tier_of(source: str) -> str:
    """Of what `Restored.sources` calls "node", "node 3", "home" or "object store"."""
    if source.startswith("node "):
        return PEER
    return OBJECT if source == "object store" else source


def note_restore(figures: RestoreFigures, failed: bool, registry: Registry = PROCESS) -> None:
    for tier, _, _ in figures.failures:
        registry.add("ckpt.verify.failures", tier=tier)
    if not failed and not figures.name:
        return  # there was nothing
    registry.add("ckpt.restore.count", outcome="failed" if failed else figures.outcome)
    if failed:
        return
    for phase, seconds in (("choose", figures.choose_s), ("read", figures.read_s), ("load", figures.load_s)):
        registry.observe("ckpt.restore.duration", seconds, phase=phase, tier=figures.tier)
    for tier, count in figures.read_bytes.items():
        registry.add("ckpt.io", count, direction="read", tier=tier)


def note_retries(tier: str, count: int, code: int, registry: Registry = PROCESS) -> None:
    """
    Args:
        count: attempts to carry a checkpoint that have failed.
        code: of the last error, as errno has it; 0: none of the system.
    """
    if count > 0:
        registry.add("ckpt.drain.retries", count, tier=tier, error=errno.errorcode.get(code, "other"))


def note_drained(tier: str, outcome: str, seconds: float, registry: Registry = PROCESS) -> None:
    registry.observe("ckpt.drain.duration", max(0.0, seconds), tier=tier, outcome=outcome)
