"""What has become of generations whose node takes no journal any more: told at home, as long as that lasts.

home/.drain/<run>/ended-000000000007-node-0001.json     the journal, as it should be on the node
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ckpt.directory.step_names import names_in
from ckpt.drain import journal as journals
from ckpt.drain.journal import COMMITTED, Journal
from ckpt.errors import StorageError
from ckpt.storage import durable

_PREFIX = "ended-"


class Stranded:
    """Of one drain."""

    def __init__(self) -> None:
        self._kept: dict[Path, bytes] | None = None  # None: what a drain before this one has left was not looked for yet

    def has_work(self, known: Iterable[Journal]) -> bool:
        """Cheap: home is not looked at."""
        return self._kept is None or bool(self._kept) or any(each.unwritten for each in known)

    def keep(self, folder: Path, node: int, known: Iterable[Journal]) -> None:
        """Tells the end of those of these that the node has not taken; what is home is seen there. Takes back all else.

        Args:
            folder: of the run, at home.
            node: the number of this one.

        Raises:
            StorageError: home cannot be read, or written to.
        """
        ended = [each for each in known if each.unwritten and each.is_over and each.state != COMMITTED]
        told = {folder / _name(each.sequence, node): journals.to_json(each) for each in ended}
        if self._kept is None:
            suffix = _name(0, node).rpartition("-node-")[2]
            left = (name for name in names_in(folder) if name.startswith(_PREFIX) and name.endswith(f"-node-{suffix}"))
            self._kept = {folder / name: b"" for name in left}
        for path in self._kept.keys() - told.keys():
            durable.remove_file(path)
            del self._kept[path]
        for path, content in told.items():
            if self._kept.get(path) != content:
                durable.make_directory(folder, durable=True)
                durable.replace_durably(path, content, "journal")
                self._kept[path] = content


def _name(sequence: int, node: int) -> str:
    return f"{_PREFIX}{sequence:012d}-node-{node:04d}.json"


def read_end(folder: Path, sequence: int) -> Journal | None:
    """As any node has told it.

    Args:
        folder: of the run, at home.
    """
    begin = _name(sequence, 0).rpartition("-node-")[0]
    try:
        names = sorted(name for name in names_in(folder) if name.startswith(f"{begin}-node-"))
    except StorageError:
        return None
    return next((journal for name in names if (journal := journals.read(folder / name)) is not None), None)
