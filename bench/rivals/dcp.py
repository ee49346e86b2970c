"""torch.distributed.checkpoint as an engine: synchronous, and asynchronous with a thread or a process behind it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from bench.rivals.registry import TINY, WRITERS, Engine

FILES = f"FileSystemWriter(thread_count={WRITERS}, sync_files=True)"


class DcpSave(Engine):
    name = "DCP save"
    configuration = f"dcp.save, {FILES}; directories fsynced by this program"
    copies = 0

    def open(self) -> None:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as it should be

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        dcp.save(state, storage_writer=writer(path), no_dist=True)

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        dcp.load(into, checkpoint_id=str(path), no_dist=True)
        return into


class DcpAsyncThread(DcpSave):
    name = "DCP async_save, thread"
    configuration = f"dcp.async_save by a thread, {FILES}; one DefaultStager, so that its copy of the state is kept and reused"
    copies = 1
    staging = StagingOptions(False, False, False, False)  # pinned, shared, asynchronous, non-blocking
    kind = AsyncCheckpointerType.THREAD

    def open(self) -> None:
        super().open()
        self._stager = DefaultStager(self.staging)
        self._staged: Any = None
        self._written: Any = None

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        started = dcp.async_save(
            state,
            storage_writer=writer(path),
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
            no_dist=True,
        )
        if isinstance(started, AsyncSaveResponse):
            self._staged, self._written = started.staging_completion, started.upload_completion
        else:
            self._staged, self._written = None, started

    def before_step(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def finish(self) -> None:
        if self._written is not None:
            self._written.result()
            self._written = None

    def close(self) -> None:
        self.finish()
        self._stager.close()


class DcpAsyncStaging(DcpAsyncThread):
    name = "DCP async_save, thread, asynchronous staging"
    configuration = f"{DcpAsyncThread.configuration}, by a thread of its own: StagingOptions(use_async_staging=True)"
    staging = StagingOptions(False, False, True, False)


class DcpAsyncProcess(DcpAsyncThread):
    name = "DCP async_save, process"
    configuration = (
        f"dcp.async_save by a process, {FILES}; staged by a thread into shared memory that is kept and reused: "
        "StagingOptions(use_shared_memory=True, use_async_staging=True)"
    )
    staging = StagingOptions(False, True, True, False)
    kind = AsyncCheckpointerType.PROCESS

    def open(self) -> None:
        """Starts the process with a first small save; that needs a process group, and nothing later does."""
        super().open()
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            with quiet():
                self.save(TINY)
                self.finish()
        finally:
            dist.destroy_process_group()

    def close(self) -> None:
        super().close()
        _async_process_executor._CHECKPOINT_PROCESS = None  # its __del__ ends the process


def writer(path: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, thread_count=WRITERS, sync_files=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A process started in here says what it does to nobody."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nobody:
        os.dup2(nobody.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
