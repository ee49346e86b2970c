"""Names of checkpoints that a framework chooses: when they get them, and what becomes of what had them. For adapters.

A directory in which several files make one checkpoint is put together under a name of `hidden_directory`, and gets its own by
`name_directory` when all of it is durable: who lists the directories never meets half of one.
"""

from pathlib import Path

from ckpt.storage import durable
from ckpt.storage.carrying import carry_over
from ckpt.storage.exchange import name_directory, remove, remove_abandoned, replace_link, retire
from ckpt.storage.temporary_names import temporary_path

__all__ = [
    "carry_over",
    "hidden_directory",
    "make_directory",
    "name_directory",
    "remove",
    "remove_abandoned",
    "replace_link",
    "retire",
]


def hidden_directory(final: Path) -> Path:
    """What to call a directory until it is complete: a name beside `final` that no other save uses. It is not made.

    If this process is killed before it gets its own name, `remove_abandoned()` of what it lies in removes it.
    """
    return temporary_path(final)


def make_directory(path: Path) -> None:
    """With its parents, durably. One that exists is fine.

    Raises:
        StorageError: it cannot be made, or not be entered.
    """
    durable.make_directory(path, durable=True)
