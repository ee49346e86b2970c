"""Events as a trace: what training waited for and what went on behind it, to be looked at in Perfetto or chrome://tracing.

The format is the JSON of Chrome's trace events: an object with `traceEvents`. Times are microseconds of the Unix epoch, so that
a trace of torch.profiler can be laid beside it. Each rank is a process, with these threads:

    training         save(), and the fence behind it; restores
    writers n        the files of one save: until they are durable, with the time until tensors may change in it, and fsync
    committer        what makes them a checkpoint, with the renames of this rank's files in it
    drain to TIER n  checkpoints on their way from there

An event says how long things took, not when each began: a fence is drawn where it ended, at the instant of capture. Fences of a
save that several ones have held up are drawn as one.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]
_TRAINING, _COMMITTER, _WRITERS, _DRAINS = 1, 2, 10, 100  # numbers of threads; the last two are those of the first of several
_UNDRAWN = "schema", "event", "time"
_DEEPEST = 10  # dicts and lists in each other
_MOST_ROWS = 80  # of one kind
_S_TO_US = 1e6
_MOST = 1e15  # of a number that is drawn: larger than any time, or any bytes, and exact


class _Rows:
    """Threads of one kind: what overlaps in time gets another one, because slices of one thread must lie inside each other."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def take(self, begin: float, end: float) -> int:
        free = next((row for row, until in enumerate(self._ends) if until <= begin), len(self._ends))
        free = min(free, _MOST_ROWS - 1)
        self._ends[free : free + 1] = [end]
        return free


class _Process:
    """One rank of one job."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid = pid
        self.drawn: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}]
        self._named: set[int] = set()
        self._writers = _Rows()
        self._drains: dict[str, _Rows] = {}
        self._flows = 0
        self._training_until = 0.0
        self._commit_until = 0.0

    # ---- what a trace consists of ----------------------------------------------------------------------------------

    def _slice(self, thread: tuple[int, str], name: str, begin: float, end: float, arguments: Event) -> None:
        """
        Args:
            begin, end: Unix times.
        """
        tid = self._thread(*thread)
        timing = {"ts": begin * _S_TO_US, "dur": max(0.0, end - begin) * _S_TO_US}
        self.drawn.append({"ph": "X", "name": name, "cat": "ckpt", "pid": self.pid, "tid": tid, **timing, "args": arguments})

    def _thread(self, tid: int, name: str) -> int:
        if tid not in self._named:
            self._named.add(tid)
            about = {"ph": "M", "pid": self.pid, "tid": tid}
            self.drawn.append({**about, "name": "thread_name", "args": {"name": name}})
            self.drawn.append({**about, "name": "thread_sort_index", "args": {"sort_index": tid}})
        return tid

    def _flow(self, begin: float, end: float) -> None:
        """From a slice of the training to one of the committer."""
        self._flows += 1
        about = {"name": "commit", "cat": "ckpt", "id": self.pid * 10**9 + self._flows, "pid": self.pid}
        self.drawn.append({**about, "ph": "s", "tid": _TRAINING, "ts": begin * _S_TO_US})
        self.drawn.append({**about, "ph": "f", "bp": "e", "tid": _COMMITTER, "ts": end * _S_TO_US})

    def _counter(self, name: str, at: float, values: Mapping[str, float]) -> None:
        self.drawn.append({"ph": "C", "name": name, "pid": self.pid, "tid": 0, "ts": at * _S_TO_US, "args": values})

    def _instant(self, name: str, at: float, arguments: Event) -> None:
        tid = self._thread(_COMMITTER, "committer")
        about = {"name": name, "cat": "ckpt", "pid": self.pid, "tid": tid, "args": arguments}
        self.drawn.append({"ph": "i", "s": "t", "ts": at * _S_TO_US, **about})

    # ---- events ----------------------------------------------------------------------------------------------------

    def draw(self, event: Event, at: float) -> None:
        """
        Args:
            at: when it was noted, Unix time.
        """
        kind, details = event["event"], {key: value for key, value in event.items() if key not in _UNDRAWN}
        if kind == "save":
            self._draw_save(event, at, details)
        elif kind == "drain":
            self._draw_drain(event, at, details)
        elif kind == "restore":
            end = at
            self._slice((_TRAINING, "training"), f"restore {event.get('step')}", end - _number(event, "total_s"), end, details)
        elif kind != "commit":  # which its save draws
            self._instant(f"{kind} {event.get('step', '')}".strip(), at, details)

    def _draw_save(self, event: Event, at: float, details: Event) -> None:
        outcome = event.get("outcome")
        name = f"save {event.get('step')}" + ("" if outcome == "committed" else f" ({outcome})")
        began = _number(event, "began", at)
        # Noted microseconds apart from the clock of durations, so that one may seem to begin inside another.
        began = max(began, self._training_until)
        saved = self._training_until = began + _number(event, "save_s")
        self._slice((_TRAINING, "training"), name, began, saved, details)
        captured, flushed = _instant_of(event, "captured_s", began), _instant_of(event, "flushed_s", began)
        held = _number(event, "fence_s")
        if held > 0 and captured is not None:
            begin, end = max(saved, captured - held), max(saved, captured)
            self._slice((_TRAINING, "training"), f"fence {event.get('step')}", begin, end, {"fence_s": held})
            self._training_until = end
        if flushed is not None:
            self._draw_files(event, began, captured, flushed)
        if outcome == "committed" and flushed is not None:
            self._draw_commit(event, began, flushed)
        self._counter("arena", at, {"used": _number(event, "arena_used")})

    def _draw_files(self, event: Event, began: float, captured: float | None, flushed: float) -> None:
        row = self._writers.take(began, flushed)
        thread = _WRITERS + row, f"writers {row + 1}"
        sizes = {key: value for key, value in event.items() if key.startswith("bytes_")}
        self._slice(thread, f"write {event.get('step')}", began, flushed, sizes)
        if captured is not None:
            self._slice(thread, f"capture {event.get('step')}", began, min(captured, flushed), {})
        written = _instant_of(event, "written_s", began)
        if written is not None:  # events of before have none
            begin = max(written, began if captured is None else captured)
            self._slice(thread, f"fsync {event.get('step')}", min(begin, flushed), flushed, {})

    def _draw_commit(self, event: Event, began: float, flushed: float) -> None:
        """One after the other: what was durable before the last one had ended has waited for that."""
        tiers = event.get("tiers_s") or {}
        landed = tiers.get("node") if isinstance(tiers, dict) else None
        after = _finite(landed)
        end = _instant_of(event, "durable_s", began) if after is None else began + after
        if end is None:
            return
        begin = min(max(flushed, self._commit_until), end)
        self._commit_until = end
        told = {key: event.get(key) for key in ("sequence", "slowest_rank", "all_ranks", "tiers_s") if key in event}
        self._slice((_COMMITTER, "committer"), f"commit {event.get('step')}", begin, end, told)
        named = _instant_of(event, "named_s", began)
        if named is not None:
            self._slice((_COMMITTER, "committer"), f"rename {event.get('step')}", begin, min(max(named, begin), end), {})
        self._flow(began, begin)

    def _draw_drain(self, event: Event, at: float, details: Event) -> None:
        tier = str(event.get("tier"))
        began, ended = _finite(event.get("began")), _finite(event.get("ended"))
        if began is not None and ended is not None:
            rows = self._drains.setdefault(tier, _Rows())
            row = rows.take(began, ended)
            first = _DRAINS * (1 + list(self._drains).index(tier))
            thread = first + row, f"drain to {tier} {row + 1}"
            self._slice(thread, f"drain {event.get('step')} ({event.get('outcome')})", began, ended, details)
        if event.get("backlog_bytes") is not None:
            self._counter(f"backlog to {tier}", at, {"bytes": _number(event, "backlog_bytes")})


def make_trace(events: Iterable[Event]) -> dict[str, Any]:
    """
    Args:
        events: of events.jsonl, in any order; those without a time are left out.
    """
    plain = (_plain(event) for event in events)
    timed = sorted(((at, event) for event in plain if (at := _time_of(event)) is not None), key=_when)
    processes: dict[tuple[str, str, int], _Process] = {}
    for at, event in timed:
        run, host, rank = str(event.get("run", "")), str(event.get("host", "")), int(_number(event, "rank"))
        found = processes.get((run, host, rank))
        if found is None:
            name = f"rank {rank} on {host}" + (f" ({run})" if run else "")
            found = processes[run, host, rank] = _Process(len(processes) + 1, name)
        found.draw(event, at)
    return {"displayTimeUnit": "ms", "traceEvents": [each for process in processes.values() for each in process.drawn]}


def _when(timed: tuple[float, Event]) -> float:
    """Of saves their beginning: they are noted at their end, and may end out of order."""
    at, event = timed
    return _number(event, "began", at) if event["event"] == "save" else at


def _time_of(event: Event) -> float | None:
    try:
        return datetime.datetime.fromisoformat(str(event["time"]).replace("Z", "+00:00")).timestamp()
    except (KeyError, ValueError, OverflowError):
        return None


def _number(event: Event, key: str, default: float = 0.0) -> float:
    found = _finite(event.get(key))
    return default if found is None else found


def _finite(value: Any) -> float | None:
    """None if it is no number, or none that a trace can have: a line may hold anything."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _MOST:
        return None
    return float(value)


def _plain(value: Any, depth: int = _DEEPEST) -> Any:
    """The same, with a text instead of a number that JSON does not have, and of what no event has so deep."""
    if isinstance(value, (dict, list)) and not depth:
        return "..."
    if isinstance(value, dict):
        return {key: _plain(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, depth - 1) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _instant_of(event: Event, key: str, began: float) -> float | None:
    """Unix time of what came so many seconds after the beginning; None if it did not."""
    after = _finite(event.get(key))
    return None if after is None else began + after
