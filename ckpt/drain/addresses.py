"""Where the drains of a run serve what lies on their nodes: a small file of each at home, which also holds what opens the door.

    home/.drain/<run>/node-0003.json    {"host", "port", "token", "node", "ranks"}; only the user of the job can read it

It is written anew by each drain, and withdrawn at its end. One that was killed leaves its own: nobody answers there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from ckpt.directory import manifest as manifests
from ckpt.directory.publish_lock import FOLDER
from ckpt.directory.step_names import names_in
from ckpt.storage import durable, scratch

_PREFIX, _SUFFIX = "node-", ".json"
_LARGEST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ServerAddress:
    """
    Attributes:
        token: random; who has it may read.
        ranks: whose files lie on that node.
    """

    host: str
    port: int
    token: str
    node: int
    ranks: frozenset[int]


def path_of(home: Path, run: str, node: int) -> Path:
    return home / FOLDER / run / f"{_PREFIX}{node:04d}{_SUFFIX}"


def announce(home: Path, run: str, address: ServerAddress) -> None:
    """
    Raises:
        StorageError: home cannot be written to.
    """
    document = {**dataclasses.asdict(address), "format": manifests.FORMAT, "ranks": sorted(address.ranks)}
    path = path_of(home, run, address.node)
    durable.make_directory(path.parent, durable=True)
    scratch.replace_private(path, manifests.with_checksum(document))


def withdraw(home: Path, run: str, address: ServerAddress) -> None:
    """Unless another drain has written its own there."""
    path = path_of(home, run, address.node)
    with contextlib.suppress(OSError):
        if read(path) == address:
            scratch.remove(path)


def read(path: Path) -> ServerAddress | None:
    """None if there is none, or it cannot be understood."""
    try:
        with path.open("rb") as file:
            said: dict[str, Any] = manifests.parse_checked(file.read(_LARGEST_BYTES))
        ranks = frozenset(int(rank) for rank in said["ranks"])
        return ServerAddress(str(said["host"]), int(said["port"]), str(said["token"]), int(said["node"]), ranks)
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def read_all(home: Path, run: str) -> list[ServerAddress]:
    """In the order of nodes.

    Raises:
        StorageError: home cannot be read.
    """
    folder = home / FOLDER / run
    names = sorted(name for name in names_in(folder) if name.startswith(_PREFIX) and name.endswith(_SUFFIX))
    return [address for name in names if (address := read(folder / name)) is not None]
