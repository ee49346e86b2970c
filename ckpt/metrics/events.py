"""events.jsonl: what has happened to the checkpoints of a directory, one JSON object a line, for people and for `ckpt trace`.

It belongs to the job that saves there. So nothing is written before that has claimed the directory: what was noted until then,
as a restore, comes first. Nothing depends on the file. A line that cannot be written is lost; the next one says how many are.
"""

from __future__ import annotations

import collections
import datetime
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckpt.errors import StorageError
from ckpt.metrics.line_writer import LineWriter
from ckpt.metrics.noting import RestoreFigures
from ckpt.metrics.record import SaveRecord
from ckpt.metrics.registry import PROCESS, Registry
from ckpt.metrics.stats import SaveStats
from ckpt.storage.durable import Directory
from ckpt.storage.log_file import append_line

logger = logging.getLogger("ckpt")

NAME, OLDER = "events.jsonl", "events.1.jsonl"
SCHEMA = 1
_MOST_BYTES = 32 << 20  # of a file; with the one before it, twice that. A save takes some 1.2 KiB
CLOSE_S = 2.0  # that an end waits for lines which are not written yet
_MOST_WAITING = 100  # events that are noted before the directory is claimed; of more the oldest go

Note = Callable[..., None]  # given the kind of an event, and its fields


def ignore(event: str, **fields: Any) -> None:
    """A Note of who keeps no events."""


class EventLog:
    """Of one process, in one directory.

    Args:
        rank: of this process among those that save there. Rank 0 renames the file when it is large.
        behind: on a thread of its own, since saves do not depend on this directory: on a node they go on when home hangs.
            Else what a save notes is written by its finisher's thread, which has made something durable there just before:
            where that hangs, the save does, too.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        *,
        behind: bool = False,
        registry: Registry = PROCESS,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._directory = directory
        self._held: Directory | None = None  # from begin() on: events follow it when somebody renames it
        self._rank = rank
        self._most_bytes = most_bytes if rank == 0 else None
        self._registry = registry
        self._owner = os.getpid()
        self._lock = threading.RLock()  # a signal handler may save. Guards what follows
        self._waiting: collections.deque[bytes] | None = collections.deque(maxlen=_MOST_WAITING)
        self._closed = False
        self._behind = behind
        self._writer = LineWriter(self._write)
        self._writing = threading.RLock()  # held while a line is written: whoever may not wait for that hands his over
        self._lost = 0
        self._warned = False

    def begin(self) -> None:
        """The directory is there, and ours. Safe to call again."""
        if self._waiting is None or os.getpid() != self._owner:
            return
        with self._lock:
            waiting, self._waiting = self._waiting or (), None
            try:
                self._held = Directory(self._directory)
            except StorageError as error:
                self._lose(error)
        for line in waiting:
            self._hand_over(line, self._behind)

    def note(self, event: str, *, in_passing: bool = False, **fields: Any) -> None:
        """Writes it, or loses it. Raises nothing.

        Args:
            event: "save", "commit", "drain", "restore", "delete", "verify" or "warning".
            in_passing: the thread that calls may not wait for the file system.
            fields: numbers, texts, and None.
        """
        if self._closed or os.getpid() != self._owner:
            return
        try:
            said = {"schema": SCHEMA, "time": now(), "event": event, **self._registry.constants(), "rank": self._rank}
            line = json.dumps({**said, **fields}, separators=(",", ":"), default=str).encode()
        except Exception as error:  # of what a caller has put into it, which may be anything
            return self._lose(error)
        with self._lock:
            if self._waiting is not None:
                self._waiting.append(line)
                return
        self._hand_over(line, self._behind or in_passing)

    def _hand_over(self, line: bytes, behind: bool) -> None:
        if self._held is None:
            return
        if not behind:
            self._write(line)
        elif not self._writer.put(line):
            self._lose("they come faster than they can be written")

    def _write(self, line: bytes) -> None:
        with self._writing:
            held, lost = self._held, self._lost
            if held is None:
                return
            if lost:
                line = line[:-1] + b',"lost":%d}' % lost
            try:
                append_line(held.reach / NAME, line, self._most_bytes, held.reach / OLDER)
            except Exception as error:
                self._lose(error)
            else:
                with self._lock:
                    self._lost -= lost

    def _lose(self, why: object) -> None:
        with self._lock:
            self._lost += 1
            warned, self._warned = self._warned, True
        if not warned:
            text = "events are lost, the checkpoints are not concerned (this is said once): those for '%s': %s"
            logger.warning(text, self._directory / NAME, why)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """What comes later is not noted: the directory may belong to another job.

        Args:
            timeout_s: how long to wait for what was noted before, and is written behind.
        """
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._closed = True
        written = self._writer.close(timeout_s) and self._writing.acquire(timeout=timeout_s)
        try:
            with self._lock:
                held, self._held = self._held, None
            if held is not None and written:  # else it ends with the line that hangs
                held.close()
        finally:
            if written:
                self._writing.release()


def is_wanted(events: bool | str, rank: int, *, by_default: bool) -> bool:
    """Whether this rank keeps events.

    Args:
        events: of Options.
        by_default: whether rank 0 does with "auto".
    """
    if events == "auto":
        return by_default and rank == 0
    return events == "all" or (events is True and rank == 0)


def now() -> str:
    """As RFC 3339 has it."""
    found = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    return found.replace("+00:00", "Z")


# ---- the fields of events --------------------------------------------------------------------------------------------


def save_fields(record: SaveRecord, arena_used: int) -> dict[str, Any]:
    """Of "save": durations are seconds by the monotonic clock, from the call of save() on; `began` is Unix time."""
    stats, error = record.stats, record.error
    return {
        "step": record.step,
        "sequence": record.sequence,
        "path": str(record.path),
        "outcome": record.outcome,
        "began": None if stats.started_at is None else round(time.time() - (time.monotonic() - stats.started_at), 6),
        **_durations(stats),
        "bytes_total": stats.bytes_total,
        "bytes_from_tensors": stats.bytes_from_tensors,
        "bytes_copied_in_save": stats.bytes_copied_in_save,
        "bytes_copied_at_fence": stats.bytes_copied_at_fence,
        "bytes_from_devices": stats.bytes_from_devices,
        "reused_bytes": stats.reused_bytes,
        "unread_bytes": stats.unread_bytes,
        "direct_io": stats.direct_io,
        "device_mode": stats.device_mode,
        "arena_bytes": stats.arena_bytes,
        "arena_used": arena_used,
        "world_size": record.world_size,
        "slowest_rank": record.slowest_rank,
        **({"all_ranks": dict(record.all_ranks)} if record.all_ranks else {}),
        "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
    }


def _durations(stats: SaveStats) -> dict[str, Any]:
    waits = "blocked_s", "save_s", "fence_s", "arena_wait_s"
    names = *waits, "captured_s", "written_s", "flushed_s", "named_s", "durable_s"
    found: dict[str, Any] = {name: _rounded(getattr(stats, name)) for name in names}
    if stats.started_at is not None and stats.tier_at:
        found["tiers_s"] = {name: _rounded(at - stats.started_at) for name, at in stats.tier_at.items()}
    return found


def restore_fields(figures: RestoreFigures, error: BaseException | None) -> dict[str, Any]:
    """Of "restore"."""
    return {
        "step": figures.step,
        "sequence": figures.sequence,
        "outcome": "failed" if error is not None else figures.outcome if figures.name else "nothing",
        "total_s": _rounded(figures.total_s),
        "choose_s": _rounded(figures.choose_s),
        "read_s": _rounded(figures.read_s),
        "load_s": _rounded(figures.load_s),
        "bytes": dict(figures.read_bytes),
        "tier": figures.tier,
        "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_events(directory: Path) -> Iterator[dict[str, Any]]:
    """In the order in which they were written. What is no event, as a line that was cut off, is passed over.

    Raises:
        OSError: the newer file is not there, or cannot be read.
    """
    older = directory / OLDER
    for path in [older] * older.exists() + [directory / NAME]:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                event = _parsed(line)
                if event is not None:
                    yield event


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA and isinstance(found.get("event"), str) else None
