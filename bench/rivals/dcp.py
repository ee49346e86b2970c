"""torch.distributed.checkpoint as a rival: synchronous, and asynchronous with a thread or a process behind it."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from bench.measure.sampling import clock
from bench.rivals.base import KEEP, TINY, WRITERS, Rival

DEADLINE_S = 600.0  # for one save
FILES = f"FileSystemWriter(thread_count={WRITERS}, sync_files=True)"


class DcpSave(Rival):
    name = "DCP save"
    configuration = f"dcp.save, {FILES}; directories fsynced by this program"
    copies = 0
    no_dist = True  # this process alone

    def open(self) -> None:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as it should be

    def _writer(self, path: Path) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(path, thread_count=WRITERS, sync_files=True)

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        dcp.save(state, storage_writer=self._writer(path), no_dist=self.no_dist)
        self.durable_at = clock()

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        dcp.load(into, checkpoint_id=str(path), no_dist=True)
        return into


class InGroup:
    """With the writer's defaults, by all processes of the group that there is."""

    no_dist = False

    def _writer(self, path: Path) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(path)

    def load(self, into: dict[str, Any]) -> None:
        dcp.load(into, checkpoint_id=str(self.newest))  # type: ignore[attr-defined]


class DcpSaveInGroup(InGroup, DcpSave):
    configuration = "torch.distributed.checkpoint.save with FileSystemWriter's defaults, which fsync the data"


class DcpAsync(DcpSave):
    """A stager copies the state, then a thread or a process writes it."""

    copies = 1
    kind = AsyncCheckpointerType.THREAD
    staging = StagingOptions(False, False, False, False)  # pinned, shared, asynchronous, non-blocking
    group: Any = None  # of processes that save together; None: the default one

    def __init__(self, directory: Path, keep: int = KEEP) -> None:
        super().__init__(directory, keep)
        self._stager: Any = None
        self._staged: Future[Any] | None = None
        self._written: Future[Any] | None = None

    def _make_stager(self) -> Any:
        """None: async_save makes one for each save."""
        return DefaultStager(self.staging)

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        if self._stager is None:
            self._stager = self._make_stager()
        self.durable_at = math.nan
        answer = dcp.async_save(
            state,
            storage_writer=self._writer(path),
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
            process_group=self.group,
            no_dist=self.no_dist,
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staged, self._written = answer.staging_completion, answer.upload_completion
        else:
            self._staged, self._written = None, answer
        self._written.add_done_callback(self._note_end)

    def _note_end(self, _: Future[Any]) -> None:
        self.durable_at = clock()

    def before_step(self) -> None:
        if self._staged is not None:
            self._staged.result(DEADLINE_S)

    def finish(self) -> None:
        if self._written is not None:
            written, self._written = self._written, None
            written.result(DEADLINE_S)
            if math.isnan(self.durable_at):  # who waits is told before the callback is
                self.durable_at = clock()

    def close(self) -> None:
        try:
            self.finish()
        finally:
            if self._stager is not None:
                self._stager.close()
                self._stager = None


class DcpAsyncThread(DcpAsync):
    name = "DCP async_save, thread"
    configuration = f"dcp.async_save by a thread, {FILES}; one DefaultStager, so that its copy of the state is kept and reused"


class DcpAsyncStaging(DcpAsync):
    name = "DCP async_save, thread, asynchronous staging"
    configuration = f"{DcpAsyncThread.configuration}, by a thread of its own: StagingOptions(use_async_staging=True)"
    staging = StagingOptions(False, False, True, False)


class DcpAsyncProcess(DcpAsync):
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
