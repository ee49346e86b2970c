"""What other nodes say of a generation of which they have a part: that they have given up, or nothing at all.

home/.drain/<run>/<sequence>/failure-node-0001.json     {"node", "host", "errno", "text"}; goes when that node begins again
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.node_place import NodePlace
from ckpt.directory.step_names import names_in
from ckpt.errors import StorageError
from ckpt.storage import durable

# Longer than a node that is well can be without a sign: each second it makes durable what it has copied.
_SILENCE_S = 600.0
_BY_NODE = re.compile(r"(?:receipt|failure)-node-(\d+)\.")
_BY_RANK = re.compile(r"(?:rank-|__)(\d+)")
_LOOK_EACH_S = 10.0  # it lists all that is on its way, at a home that may be slow


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a generation does not come home, as another node has it.

    Attributes:
        errno: 0: it is no error of a system call.
    """

    text: str
    errno: int = 0


def path_of(inbox: Path, node: int) -> Path:
    return inbox / f"failure-node-{node:04d}.json"


def write_failure(inbox: Path, node: int, failure: Failure) -> None:
    """
    Raises:
        StorageError: it cannot be written.
    """
    said = {"format": manifests.FORMAT, "node": node, "host": socket.gethostname(), **dataclasses.asdict(failure)}
    durable.replace_durably(path_of(inbox, node), manifests.with_checksum(said), "drain-failure")


def take_back_failure(inbox: Path, node: int) -> None:
    """
    Raises:
        StorageError: it cannot be removed.
    """
    if os.path.lexists(path_of(inbox, node)):
        durable.remove_file(path_of(inbox, node))


def read_failure(inbox: Path, nodes: Sequence[int]) -> Failure | None:
    """Of the first of these nodes that has given up; it names the node."""
    for node in nodes:
        try:
            said = manifests.parse_checked(path_of(inbox, node).read_bytes())
            return Failure(f"node {node} ({said['host']}) has given up its part: {said['text']}", int(said["errno"]))
        except (OSError, KeyError, TypeError, ValueError, RecursionError):
            continue  # there is none, or it is just being taken back
    return None


class Silence:
    """Of other nodes: for how long nothing has come from any of them, whichever generation it is of.

    Args:
        inboxes: where all that is on its way lies.
        clock: seconds.
    """

    def __init__(self, inboxes: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._inboxes = inboxes
        self._clock = clock
        self._seen = _Signs({}, {})
        self._since = self._looked = clock()

    def failure(self, place: NodePlace, missing: Sequence[int], waited_s: float) -> Failure | None:
        """If it has lasted too long.

        Args:
            place: of this node.
            missing: nodes that have not delivered.
            waited_s: since this node has delivered; before, the others may have had nothing to do.
        """
        now = self._clock()
        if now - self._looked >= min(_LOOK_EACH_S, _SILENCE_S / 4):
            self._looked, seen = now, self._look(place)
            if seen.go_on_from(self._seen):
                self._since = now
            self._seen = seen
        if min(now - self._since, waited_s) < _SILENCE_S:
            return None
        named = ", ".join(map(str, missing))
        return Failure(
            f"node {named} has not delivered its part, and for {_SILENCE_S:g} s nothing has come from any other node. See "
            f"whether it lives, and what its drain.log says; `python -m ckpt drain --once` there delivers it",
            errno.ETIMEDOUT,
        )

    def _look(self, place: NodePlace) -> _Signs:
        signs = _Signs({}, {})
        for inbox in names_in(self._inboxes) if os.path.isdir(self._inboxes) else ():
            try:
                with os.scandir(self._inboxes / inbox) as entries:
                    found = {entry.name: _stamp(entry) for entry in entries}
            except NotADirectoryError:  # where a node serves
                continue
            except OSError as error:
                if error.errno != errno.ENOENT:  # else it has just gone
                    text = f"cannot read '{self._inboxes / inbox}': {error.strerror}"
                    raise StorageError(error.errno or 0, text, str(self._inboxes)) from error
                continue
            signs.add(inbox, found, place)
        return signs


_Stamp = tuple[int, int]


@dataclasses.dataclass
class _Signs:
    """
    Attributes:
        theirs: what only other nodes write, by inbox and name.
        shared: what all write together, where this node has delivered its part, and so writes no more.
    """

    theirs: dict[tuple[str, str], _Stamp]
    shared: dict[tuple[str, str], _Stamp]

    def add(self, inbox: str, found: Mapping[str, _Stamp], place: NodePlace) -> None:
        delivered = f"receipt-node-{place.number:04d}.json" in found
        for name, stamp in found.items():
            by_node, by_rank = _BY_NODE.match(name), _BY_RANK.match(name)
            if by_node is not None:
                is_theirs = int(by_node[1]) != place.number
            else:
                is_theirs = by_rank is not None and int(by_rank[1]) not in place.ranks
            if is_theirs:
                self.theirs[inbox, name] = stamp
            elif by_node is None and by_rank is None and delivered and name.endswith(".part"):
                self.shared[inbox, name] = stamp

    def go_on_from(self, before: _Signs) -> bool:
        """Whether another node has written anything since."""
        grown = any(before.shared.get(key, stamp) != stamp for key, stamp in self.shared.items())
        return grown or self.theirs != before.theirs


def _stamp(entry: os.DirEntry[str]) -> _Stamp:
    stat = entry.stat(follow_symlinks=False)
    return stat.st_size, stat.st_mtime_ns
