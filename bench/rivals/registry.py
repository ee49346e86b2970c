"""What ckpt is compared with, and ckpt itself, behind one interface.

Each engine stands in the best configuration that its documentation names and that runs on a CPU; `configuration` says which.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import ckpt
from bench.measure.disk_pages import make_durable
from bench.rivals.torch_save import torch_save_durable

KEEP = 2  # checkpoints, besides the one that is being written
WRITERS = 2  # files, and threads, of engines that have such a choice
PACKAGES = ("safetensors", "torch_checkpointing", "torchsnapshot")


class Engine:
    """One way of saving a state.

    A save goes like this: `save()`, forward and backward, `before_step()`, the optimizer writes to the tensors; at some time
    `finish()`, after which the engine itself calls the checkpoint complete, and `synchronise()`, after which it survives a
    power cut. Each may take its time; that time is what is measured. The next save waits for the one before where the engine
    asks that of its user.
    """

    name: ClassVar[str]
    configuration: ClassVar[str]
    copies: ClassVar[int] = 1  # of the state that it needs at most, in memory

    def __init__(self, directory: Path, keep: int = KEEP) -> None:
        self.directory = directory
        self.keep = keep
        self._saves = 0
        directory.mkdir(parents=True)

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
        """Returns when the engine calls its newest checkpoint complete."""

    def synchronise(self) -> None:
        """Makes the newest checkpoint durable, where the engine has not done so itself."""
        make_durable(self.newest)

    def load(self, into: dict[str, Any]) -> None:
        """Brings the newest checkpoint into the tensors of a state, in place where the engine can do that."""
        copy(self._load(self.newest, into), into)

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        raise NotImplementedError

    def prune(self) -> None:
        """All but the newest checkpoints go."""
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


class Ckpt(Engine):
    name = "ckpt"
    configuration = "Checkpointer, Options(): durable, with a manifest, and old ones removed, by itself"
    copies = 0

    def __init__(self, directory: Path, keep: int = KEEP, lazy: bool | None = None) -> None:
        super().__init__(directory, keep)
        self._lazy = lazy  # None: what an optimizer owns
        self._pending: ckpt.PendingSave | None = None

    def open(self) -> None:
        self._checkpointer = ckpt.Checkpointer(self.directory, keep=self.keep, coordinator="local")

    @property
    def stats(self) -> ckpt.SaveStats:
        """Of the newest save."""
        assert self._pending is not None
        return self._pending.stats

    def save(self, state: dict[str, Any]) -> None:
        self._saves += 1
        self._pending = self._checkpointer.save(self._saves, state, lazy=self._lazy)

    def before_step(self) -> None:
        """Nothing: the optimizer's step fences by itself, and that is on the clock of the step."""

    def finish(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def synchronise(self) -> None:
        """Nothing: what it calls complete is durable."""

    def load(self, into: dict[str, Any]) -> None:
        found = self._checkpointer.restore(into=into)
        assert found is not None and found.step == self._saves

    def prune(self) -> None:
        """Nothing: it has done so itself, behind the save."""

    def close(self) -> None:
        self._checkpointer.close()


class TorchSave(Engine):
    name = "torch.save + fsync"
    configuration = "torch.save to a file, flush, fsync; torch.load(weights_only=True)"
    copies = 0
    crc32 = True

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(self.crc32)
        try:
            torch_save_durable(state, path)
        finally:
            torch.serialization.set_crc32_options(before)

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        return torch.load(path, weights_only=True)


class TorchSaveWithoutCrc(TorchSave):
    name = "torch.save without CRC-32 + fsync"
    configuration = f"{TorchSave.configuration}; torch.serialization.set_crc32_options(False)"
    crc32 = False


class Safetensors(Engine):
    name = "safetensors"
    configuration = "safetensors.torch.save_file and load_file, of the tensors only; fsynced by this program"
    copies = 0

    def open(self) -> None:
        import safetensors.torch

        self._library = safetensors.torch

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        self._library.save_file(flat(state), path)

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        return self._library.load_file(path)


class Torchsnapshot(Engine):
    name = "torchsnapshot async_take"
    configuration = "Snapshot.async_take, defaults: batched files of up to 128 MiB; fsynced by this program"

    def open(self) -> None:
        import torchsnapshot

        self._library = torchsnapshot
        self._pending: Any = None

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        self._pending = self._library.Snapshot.async_take(str(path), {"state": self._library.StateDict(**state)})

    def finish(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        state = self._library.StateDict(**into)
        self._library.Snapshot(str(path)).restore({"state": state})
        return dict(state)


class TorchCheckpointing(Engine):
    name = "torch_checkpointing"
    configuration = (
        "CheckpointManager, asynchronous: staged in the background into shared memory, written by a process with "
        f"{WRITERS} threads; use_direct_io=False (True fails on ext4, because its writes are not aligned); the step waits for "
        "manager.lock(); fsynced by this program"
    )

    def open(self) -> None:
        from torch_checkpointing import CheckpointManager, CheckpointWriterConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        saving = AsyncCheckpointSaverConfig(writer_config=CheckpointWriterConfig(file_write_max_threads=WRITERS))
        files = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(save=saving, storage_config=files))
        self._written: Any = None
        self.save(TINY)
        self.finish()

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        self._written = self._manager.save(str(path), state)

    def before_step(self) -> None:
        with self._manager.lock():
            pass

    def finish(self) -> None:
        if self._written is not None:
            self._written.result()

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        return self._manager.load(str(path), into=into)

    def close(self) -> None:
        self._manager.close()


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
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---- which of them ---------------------------------------------------------------------------------------------------


def all_engines() -> dict[str, type[Engine]]:
    from bench.rivals.dcp import DcpAsyncProcess, DcpAsyncStaging, DcpAsyncThread, DcpSave

    dcp: list[type[Engine]] = [DcpSave, DcpAsyncThread, DcpAsyncStaging, DcpAsyncProcess]
    found = [Ckpt, TorchSave, TorchSaveWithoutCrc, Safetensors, *dcp, Torchsnapshot, TorchCheckpointing]
    return {engine.name: engine for engine in found}


OURS, TORCH, DCP_THREAD = Ckpt.name, TorchSave.name, "DCP async_save, thread"
FEW = (OURS, TORCH, DCP_THREAD)


def chosen(parts: Sequence[str], default: Sequence[str] = ()) -> list[str]:
    """Ours, and the engines in whose names one of the parts stands; without parts, the default, or all.

    Raises:
        ValueError: a part stands in no name.
    """
    names = list(all_engines())
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"no engine has '{part}' in its name; there are: {'; '.join(names)}")
    if not parts:
        return [name for name in names if name in default] if default else names
    return [name for name in names if name == OURS or any(part in name for part in parts)]


@dataclasses.dataclass
class Field:
    """The engines that run here, opened; and why the others do not."""

    engines: dict[str, Engine]
    errors: dict[str, str]

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def drop(self, name: str, error: Exception) -> None:
        """From now on it is one of those that do not run."""
        self.errors[name] = said(error)
        self.engines.pop(name, None)


def said(error: BaseException) -> str:
    """An error's type and first lines, of those that carry the trace of another process."""
    return f"{type(error).__name__}: {error}"[:600]


def start(names: Sequence[str], directory: Path, lazy: bool | None = None, keep: int = KEEP) -> Field:
    """Opens engines, each in a directory of its own."""
    field, classes = Field({}, {}), all_engines()
    for number, name in enumerate(names):
        place = directory / f"engine{number}"
        engine = Ckpt(place, keep, lazy) if name == OURS else classes[name](place, keep)
        try:
            engine.open()
            field.engines[name] = engine
        except Exception as error:  # a rival that does not run is a result
            if name == OURS:
                raise
            field.drop(name, error)
    return field


def try_out(field: Field, state: dict[str, Any], into: dict[str, Any]) -> None:
    """Each saves once and loads it; one whose tensors do not come back as they were is not measured.

    Raises:
        Exception: it is ours.
    """
    for name, engine in list(field.engines.items()):
        try:
            check(engine, state, into)
        except Exception as error:
            if name == OURS:
                raise
            field.drop(name, error)


def check(engine: Engine, state: dict[str, Any], into: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: a tensor came back changed.
    """
    with torch.no_grad():
        for tensor in flat(into).values():
            tensor.zero_()
    engine.save(state)
    engine.before_step()
    engine.finish()
    engine.synchronise()
    engine.load(into)
    found = flat(into)
    for name, tensor in names_of(state):
        if not torch.equal(found[name], tensor):
            raise ValueError(f"tensor {name} came back changed")


def versions() -> dict[str, str]:
    """Of the packages of rivals that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
