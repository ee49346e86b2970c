"""What a file or directory is called while it is on its way, or on its way out.

    .tmp-<name>-<host>-<pid>-<process><number>    ignored by restore, removed by the next save

<host> and <process> are eight hexadecimal digits each, so that processes on several hosts, and a process that got the number of
one that was killed, tell their own from others'.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import socket
import zlib
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
_LONGEST_NAME = 200  # bytes of a final name that go into its temporary one
_host = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_process = secrets.token_hex(4)
_numbers = itertools.count()
TEMPORARY = re.compile(
    re.escape(TEMPORARY_PREFIX) + r"(?P<name>.+)-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<process>[0-9a-f]{8})[0-9a-f]+",
    re.DOTALL,
)


def temporary_path(final: Path) -> Path:
    """A name beside `final` that no other save uses."""
    name = os.fsdecode(os.fsencode(final.name)[:_LONGEST_NAME])  # the file system's limit holds for this name too
    return final.with_name(f"{TEMPORARY_PREFIX}{name}-{_host}-{os.getpid()}-{_process}{next(_numbers):x}")


def shared_token(number: int) -> str:
    """What names temporary file `number` of this process to the other ranks."""
    return f"{_host}-{os.getpid()}-{_process}{number:x}"


def shared_path(final: Path, token: str) -> Path:
    """The temporary name of a file that several processes write together. Only rank 0 knows its final name for sure."""
    stem = final.name.split(".")[0].split("-")[0]
    return final.with_name(f"{TEMPORARY_PREFIX}{stem}.pt-{token}")


def temporary_by(final: Path, token: str) -> Path:
    """The temporary name that all who have the token choose for a file."""
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{token}")


def is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX)


def name_behind(temporary: str) -> str | None:
    """The final name (its first 200 bytes) that a temporary one was made for; None if it is not one of ours."""
    match = TEMPORARY.fullmatch(temporary)
    return None if match is None else match["name"]


def may_be_in_use(name: str) -> bool:
    """Whether a temporary file is one of a process of this host that lives, this one included."""
    match = TEMPORARY.fullmatch(name)
    return match is not None and match["host"] == _host and not is_abandoned(match)


def is_abandoned(match: re.Match[str]) -> bool:
    """Whether the process that chose this temporary name is gone for certain."""
    pid = int(match["pid"])
    if match["host"] != _host:
        return False
    if pid == os.getpid():
        return match["process"] != _process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
