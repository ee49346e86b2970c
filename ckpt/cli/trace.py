"""`ckpt trace DIR [-o FILE]`"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ckpt.cli.answer import OK, Answer, count
from ckpt.errors import NotACheckpointError
from ckpt.metrics.events import NAME, read_events
from ckpt.metrics.trace import make_trace
from ckpt.storage import durable

SUMMARY = """What saves, restores and drains took, drawn over time, from the events of a directory of checkpoints. The file
opens in Perfetto (ui.perfetto.dev) and chrome://tracing; its times are those of torch.profiler's traces."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help=f"a directory of checkpoints with {NAME}")
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.json"), metavar="FILE", help="default: trace.json")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        NotACheckpointError: there are no events.
        CheckpointError, OSError: they cannot be read, or the trace not be written.
    """
    try:
        events = list(read_events(chosen.directory))
    except FileNotFoundError as error:
        text = f"'{chosen.directory}' holds no {NAME}: no job has kept events there (see Options.events)"
        raise NotACheckpointError(text) from error
    if not events:
        raise NotACheckpointError(f"'{chosen.directory / NAME}' holds no events")
    trace = make_trace(events)
    output = Path(os.path.abspath(chosen.output))
    durable.replace_quickly(output, json.dumps(trace, allow_nan=False).encode())
    kinds = Counter(event["event"] for event in events)
    drawn = [count(kinds[kind], kind) for kind in ("save", "restore", "drain") if kinds[kind]]
    document = {"output": str(output), "events": dict(kinds), "trace_events": len(trace["traceEvents"])}
    return Answer(OK, document, [f"{output}: {', '.join(drawn) or 'no saves'}", *_about_ranks(events)])


def _about_ranks(events: list[dict[str, Any]]) -> list[str]:
    """Whose figures these are, if ranks have kept none."""
    saves = [event for event in events if event["event"] == "save"]
    ranks = {rank for event in saves if isinstance(rank := event.get("rank"), int)}
    most = max((number for event in saves if isinstance(number := event.get("world_size"), int)), default=1)
    if not ranks or len(ranks) >= most:
        return []
    whose = f"rank {min(ranks)}" if len(ranks) == 1 else count(len(ranks), "rank")
    return [f"sizes and times are those of {whose}, of {most}: Options(events='all') keeps them of all"]
