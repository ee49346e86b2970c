"""The bundle that a thread is putting together, while the code of a framework believes that it writes files."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import ckpt
from ckpt.errors import UnsupportedError
from ckpt.state_dicts import supposedly_frozen

_open: contextvars.ContextVar[OpenBundle | None] = contextvars.ContextVar("_open", default=None)


class OpenBundle:
    """Made by Session.begin().

    Args:
        bundle: of BundleCheckpointer.
        sharded: gives what saves sharded states for the same ranks.
        since: in a directory that is somebody else's, too: when it was begun, by the clock of `time.time()`. None: all that
            lies in the directory is of the bundle.

    Attributes:
        frozen: as of Bundle.save(), for all that is saved from now on.
    """

    def __init__(self, bundle: Any, sharded: Callable[[], Any], since: float | None = None) -> None:
        self._bundle = bundle
        self._sharded = sharded
        self._since = since
        self._saved: set[Path] = set()  # files of it that were handed to the bundle
        self.frozen: Any = None

    @property
    def directory(self) -> Path:
        """Where all of it is to be written. It may get another name when all is durable."""
        directory: Path = self._bundle.directory
        return directory

    def holds(self, path: Any) -> bool:
        """Whether a file, or a directory, belongs to it."""
        if not isinstance(path, (str, os.PathLike)):
            return False
        return Path(os.path.abspath(path)).is_relative_to(self.directory)

    def has(self, path: Path) -> bool:
        """Whether a file of this path was handed to it. It gets that name only at the end."""
        return path in self._saved

    def save(self, obj: Any, path: Any, **more: Any) -> None:
        """As of Bundle.save(): what goes wrong is told by the whole bundle."""
        self._saved.add(Path(os.path.abspath(path)))
        self._bundle.save(obj, path, frozen=self.frozen, **more)

    def suppose_frozen(self, models: Iterable[Any], optimizers: Iterable[Any]) -> None:
        """What does not learn in a training of these is not read, once it has been found unchanged."""
        modules = [model for model in models if isinstance(model, torch.nn.Module)]
        groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
        self.frozen = supposedly_frozen(modules, (parameter for group in groups for parameter in group["params"]))

    def save_sharded(self, state: Any, path: Any) -> bool:
        """A directory of torch.distributed.checkpoint in it. All ranks call it. False, on all of them: it is not of the kind
        that this library shards by itself, and nothing was done."""
        try:
            self.follow(self._sharded().save(path, state))
        except UnsupportedError:
            return False
        except ckpt.CheckpointError as error:
            self._bundle.fail(error)
        return True

    def write_now(self, write: Callable[[], Any]) -> None:
        """Lets somebody else write a file of it. What goes wrong is told by the whole bundle, as of all other files."""
        try:
            write()
        except Exception as error:
            self._bundle.fail(error)

    def follow(self, pending: ckpt.PendingSave) -> None:
        """It is complete only with this save, which writes below its directory."""
        self._bundle.follow(pending)

    def fail(self, error: BaseException) -> None:
        """Nothing of it will be a checkpoint. What was begun must still be committed."""
        if not isinstance(error, ckpt.CheckpointError):
            error = ckpt.CheckpointError(f"what writes the checkpoint has raised {type(error).__name__}: {error}")
        self._bundle.fail(error)

    def commit(self) -> ckpt.PendingSave:
        """With all that was written to the directory, by whomever."""
        if self._since is None:
            self._refuse_written_twice()
        for path in [self.directory] if self._since is None else _written_since(self.directory, self._since):
            self._bundle.include(path)
        pending: ckpt.PendingSave = self._bundle.commit()
        return pending

    def _refuse_written_twice(self) -> None:
        """What somebody has written past us, under the name of a file of ours, would go when that gets its name."""
        twice = sorted(str(path.relative_to(self.directory)) for path in self._saved if os.path.lexists(path))
        if twice:
            names = ", ".join(f"'{name}'" for name in twice)
            self.fail(
                ckpt.CheckpointError(
                    f"{names} was written twice to the checkpoint, by the framework and by somebody else, and one of the two "
                    "would be lost: write it under another name, or do not let the framework write it. What that writes is in "
                    "flight until the checkpoint is durable, and can be neither read nor changed before"
                )
            )


@contextlib.contextmanager
def writing_to(bundle: OpenBundle | None) -> Iterator[None]:
    """Meanwhile what this thread writes to its directory, by writers that were replaced, goes to the bundle.

    Args:
        bundle: None: the writers are the stock ones.
    """
    token = _open.set(bundle)
    try:
        yield
    finally:
        _open.reset(token)


def bundle_of(path: Any) -> OpenBundle | None:
    """The one that this thread puts together, if the path belongs to it."""
    bundle = _open.get()
    return bundle if bundle is not None and bundle.holds(path) else None


_CLOCK_S = 2.0  # how far the clock of a file server may be behind


def _written_since(directory: Path, instant: float) -> Iterator[Path]:
    """What is new in it, and files that have changed, there and in its directories. What lies deeper is left alone."""
    for path in _entries(directory):
        if _changed_at(path) >= instant - _CLOCK_S:
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from (inner for inner in _entries(path) if inner.is_file() and _changed_at(inner) >= instant - _CLOCK_S)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError:  # no state lies there
        return []


def _changed_at(path: Path) -> float:
    """Of one that is gone, or leads nowhere: never."""
    try:
        return path.stat().st_ctime
    except OSError:
        return 0.0
