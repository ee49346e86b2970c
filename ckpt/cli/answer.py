"""What a command answers, and how it is shown: as a text for people, or as one JSON document for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCHEMA = 1  # of the documents; a new number when a field goes or changes its meaning
OK, BAD, USAGE, NONE, IN_USE, FAILED, STALE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
GREEN, RED, YELLOW, BOLD = "32", "31", "33", "1"


class UsageError(Exception):
    """Arguments that are right one by one, and do not go together."""


@dataclasses.dataclass
class Answer:
    """
    Attributes:
        code: the exit code.
        document: for --json; the schema and the name of the command are added.
        lines: for people.
    """

    code: int = OK
    document: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)


def show(answer: Answer, command: str, as_json: bool, *, again: bool = False) -> bool:
    """On standard output. False: its reader has seen enough (`| head`), which is no error.

    Args:
        again: another answer follows: then a document is one line.
    """
    if as_json:
        document = {"schema": SCHEMA, "command": command, **answer.document}
        text = json.dumps(document, indent=None if again else 1, default=str, ensure_ascii=True) + "\n"
    else:
        text = "".join(f"{line}\n" for line in answer.lines)
    try:
        sys.stdout.write(_printable(text, sys.stdout.encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.close()  # else the interpreter tries again, at its end
        return False
    return True


def _printable(text: str, encoding: str | None) -> str:
    """Names of files and keys may be no text at all."""
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


# ---- words -----------------------------------------------------------------------------------------------------------


def paint(text: str, colour: str) -> str:
    """On a terminal, unless NO_COLOR says otherwise."""
    return f"\033[{colour}m{text}\033[0m" if is_coloured() else text


def is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plain(text: str) -> str:
    """What somebody else has chosen, as a key or a name: control characters in it are shown, and not obeyed by the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(count: int) -> str:
    """ "1.5 GiB"."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, len(_UNITS))
    return f"{count / 1024**power:.1f} {_UNITS[power - 1]}"


def duration(seconds: float) -> str:
    """ "3 min", "5.2 h"."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def age_s(created: str) -> float | None:
    """Seconds since then; None if it is no time as manifests have it."""
    try:
        then = datetime.datetime.fromisoformat(created)
        now = datetime.datetime.now(then.tzinfo or datetime.timezone.utc)
        return (now - then.replace(tzinfo=then.tzinfo or datetime.timezone.utc)).total_seconds()
    except ValueError:
        return None


def cost(found: Mapping[str, float], world_size: int | None) -> str:
    """What a checkpoint has cost, as its manifest says it; empty if it does not.

    Args:
        world_size: ranks that have saved it.
    """
    words = {"blocked_s": "training was held for", "flushed_s": "files were durable after"}
    parts = [f"{text} {_exact(found[name])}" for name, text in words.items() if name in found]
    most = f" (each of the one of {world_size} ranks that had most)" if world_size is not None and world_size > 1 else ""
    return ", ".join(parts) + most if parts else ""


def _exact(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def metrics(found: Mapping[str, float]) -> str:
    """ "loss=0.25, epoch=3"."""
    return ", ".join(f"{name}={value:.6g}" for name, value in found.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """
    Args:
        right: numbers of columns that end below each other.
    """
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = []
    for row in (head, *cells):
        sides = [str.rjust if at in right else str.ljust for at in range(len(head))]
        padded = [side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return [paint(lines[0], BOLD), *lines[1:]]


def count(number: int, what: str, plural: str = "") -> str:
    """ "1 file", "3 files"."""
    return f"{number} {what if number == 1 else plural or what + 's'}"
