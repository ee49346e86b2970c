"""The one interface for all that saves a state: ckpt, and what it is compared with."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure.disk_pages import make_durable

KEEP = 2  # checkpoints, besides the one that is being written
WRITERS = 2  # files, and threads, of rivals that have such a choice


class Rival:
    """One way of saving a state, into a directory of its own: ours, or one of those it is compared with.

    A save goes like this: `save()`, forward and backward, `before_step()`, the optimizer writes to the tensors; at some time
    `finish()`, after which the rival itself calls the checkpoint complete, and `synchronise()`, after which it survives a
    power cut. Each may take its time; that time is what is measured. The next save waits for the one before where the rival
    asks that of its user.

    Attributes:
        name: what results go by.
        configuration: for the reader, what is done.
        copies: of the state that it needs at most, in memory.
        ours: an error of it ends the benchmark; an error of another is a result.
        one_file: what it writes is read by torch.load.
        flushed_at: clock() when this process had the data of the newest checkpoint on the disk; NaN: not known.
        durable_at: clock() when the rival had them there, all processes together; known after `finish()`, NaN where it does
            not see to that itself.
    """

    name: str
    configuration: str
    copies = 1
    ours = False
    one_file = False

    def __init__(self, directory: Path, keep: int = KEEP) -> None:
        self.directory = directory
        self.keep = keep
        self.flushed_at = self.durable_at = math.nan
        self._saves = 0
        directory.mkdir(parents=True, exist_ok=True)

    def open(self) -> None:
        """Starts what has to be started once.

        Raises:
            Exception: it is not installed, or cannot run here.
        """

    def save(self, state: dict[str, Any]) -> None:
        self.finish()
        self._saves += 1
        self._begin(state, self.newest)

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        raise NotImplementedError

    def before_step(self) -> None:
        """Returns when the tensors may change."""

    def finish(self) -> None:
        """Returns when the rival calls its newest checkpoint complete."""

    def synchronise(self) -> None:
        """Makes the newest checkpoint durable, where the rival has not done so itself."""
        make_durable(self.newest)

    def load(self, into: dict[str, Any]) -> None:
        """Brings the newest checkpoint into the tensors of a state, in place where the rival can do that."""
        copy(self._load(self.newest, into), into)

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        raise NotImplementedError

    def adopt(self, saves: int) -> None:
        """Other processes have saved so many checkpoints into its directory; the newest is what load() brings back."""
        self._saves = saves

    def prune(self) -> None:
        """All but the newest `keep` checkpoints go."""
        for number in range(self._saves - self.keep, -1, -1):
            if not self._path(number).exists():
                break
            remove(self._path(number))

    def close(self) -> None:
        self.finish()

    @property
    def newest(self) -> Path:
        return self._path(self._saves)

    def _path(self, number: int) -> Path:
        return self.directory / str(number)


TINY = {"starts_the_process": torch.zeros(1)}


def names_of(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state, each with its path."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from names_of(child, f"{prefix}/{key}" if prefix else str(key))


def flat(state: Any) -> dict[str, Tensor]:
    return dict(names_of(state))


def copy(source: Any, into: Any) -> None:
    """From tensor to tensor of the same path, but for those that are there already.

    Raises:
        KeyError: one is missing.
    """
    found = flat(source)
    with torch.no_grad():
        for name, tensor in names_of(into):
            if found[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(found[name])


def remove(path: Path) -> None:
    """What a rival writes into that has failed stays, and goes with the directory of the workload."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
