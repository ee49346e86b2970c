"""VerifyingStorageReader: torch's reader, which gets no byte that was not verified."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from ckpt.dcp import VerifiedFile, read_metadata
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError

from . import torch_private
from .notices import say_once

_METADATA = ".metadata"
_READ_BYTES = 4 << 20


class VerifyingStorageReader(FileSystemReader):
    """A storage reader for `torch.distributed.checkpoint.load`.

    Of a checkpoint that this library has written, each piece of 256 KiB in which something is read is verified, and damage ends
    in CorruptError. One without checksums is read as torch reads it, and the log says so.

    Attributes:
        damage: the first that was found.
    """

    def __init__(self, path: str | os.PathLike[str], *more: Any, **other: Any) -> None:
        super().__init__(path, *more, **other)
        self.damage: CheckpointError | None = None
        self._is_ours = False
        self._serves = torch_private.FileSystem is not None and torch_private.replace_files(self, _Files(self))

    def reset(self, checkpoint_id: Any = None) -> None:
        super().reset(checkpoint_id)
        self.damage, self._is_ours = None, False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """torch goes by the name of `kwargs`: where there is no `.metadata` of all ranks, it asks for that of this rank."""
        path = Path(self.path) / _METADATA
        if kwargs.get("rank") is None:
            self.damage = None
            if not self._serves:
                self.open_metadata(path)
        elif self.damage is not None:
            raise self.damage  # what ranks have written each for itself is not there, or older
        try:
            return super().read_metadata(*args, **kwargs)
        except FileNotFoundError as error:
            if not path.parent.is_dir() or any(path.parent.glob("__*.metadata")):
                raise  # torch says so; or asks for that of this rank
            self.damage = NotACheckpointError(_why_none(path.parent))
            raise self.damage from error
        except (OSError, CorruptError):
            raise
        except Exception as error:
            self.damage = CheckpointError(
                f"'{path}' cannot be read by torch {torch.__version__}: {error}. Was it written by a newer one, or by another "
                "Python? See Options.metadata_compat"
            )
            raise self.damage from error

    def read_data(self, plan: Any, planner: Any) -> Any:
        if not self._serves and self._is_ours:
            names = {self.storage_data[item.storage_index].relative_path for item in plan.items}
            for name in sorted(names):
                with self.open_data(Path(self.path) / name) as file:
                    while file.read(_READ_BYTES):
                        pass
        return super().read_data(plan, planner)

    def open_metadata(self, path: Path) -> io.BytesIO:
        with self._noting():
            content, self._is_ours = read_metadata(path.parent)
        if not self._is_ours:
            say_once("a checkpoint without checksums is read: it was not written by this library, and is not verified")
        return io.BytesIO(content)

    @contextlib.contextmanager
    def open_data(self, path: Path) -> Iterator[Any]:
        if not self._is_ours:
            with path.open("rb") as plain:
                yield plain
            return
        with self._noting(), VerifiedFile(path) as file:
            yield file

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """torch tells of errors in words of its own."""
        try:
            yield
        except CorruptError as error:
            self.damage = self.damage or error
            raise


def _why_none(directory: Path) -> str:
    """A directory without `.metadata` is no checkpoint: what it is, and what to do."""
    names = sorted(os.listdir(directory))
    steps = [name for name in names if name.startswith("step-")]
    if steps:
        why = (
            f"It holds steps of a Checkpointer: name one that was saved with sharded=, as '{directory / steps[-1]}', or call "
            "Checkpointer(...).restore(sharded_into=state)"
        )
    elif "manifest.json" in names and not any(name.endswith(".distcp") for name in names):
        why = "It is a step of a Checkpointer that was saved without sharded=: Checkpointer(...).restore() reads it"
    else:
        holds = f"it holds {len(names)} other files" if names else "it is empty"
        why = (
            f"That is written last of all, and {holds}: the save did not finish, on some rank, or is still under way. Load an "
            "older checkpoint; the log of the job that saved says what went wrong"
        )
    return f"'{directory}' is no checkpoint of torch.distributed.checkpoint: there is no .metadata in it. {why}"


_Base: Any = torch_private.FileSystem or object


class _Files(_Base):
    """What the reader opens files by."""

    def __init__(self, reader: VerifyingStorageReader) -> None:
        super().__init__()
        self._reader = reader

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode != "rb":
            with super().create_stream(path, mode) as stream:
                yield stream
        elif Path(path).name == _METADATA:
            yield self._reader.open_metadata(Path(path))
        else:
            with self._reader.open_data(Path(path)) as stream:
                yield stream
