"""Libraries that save tensors, each imported when it is opened: not all are installed everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.rivals.base import TINY, WRITERS, Rival, flat


class Safetensors(Rival):
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


class Torchsnapshot(Rival):
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


class TorchCheckpointing(Rival):
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
