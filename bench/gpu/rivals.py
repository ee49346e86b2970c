"""What saves the state of the GPU benchmark: ckpt with several options, and what it is compared with."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor, staging
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

import ckpt
from bench.gpu.device import Device
from bench.measure.disk_pages import fsync_path
from bench.measure.sampling import GIB, clock
from bench.rivals.torch_save import torch_save_durable

DEADLINE_S = 600.0  # for one save of a rival
NOTHING = "nothing saved"
TORCH, DCP, DCP_ASYNC, DATASTATES = "torch.save + fsync", "DCP save", "DCP async_save", "DataStates"
SHARED_MEMORY = Path("/dev/shm")

State = dict[str, Any]


class Saver:
    """One way of saving. begin() is what training is held up by; the others are called in this order.

    Attributes:
        how: for the reader, what is done.
        ours: an error of it ends the benchmark; of the others it is a result.
        one_file: what it writes is read by torch.load.
    """

    ours = False
    one_file = False

    def __init__(self, name: str, how: str) -> None:
        self.name, self.how = name, how

    def begin(self, state: State, path: Path) -> None:
        raise NotImplementedError

    def before_step(self) -> None:
        """Waits until the tensors may change, where nothing does that by itself."""

    def finish(self) -> float:
        """Waits until the checkpoint is durable; returns since when it is."""
        return clock()

    def close(self) -> None:
        """Gives back what it holds."""


class Ckpt(Saver):
    ours = one_file = True

    def __init__(self, name: str, options: ckpt.Options, lazy: Any) -> None:
        super().__init__(name, "ckpt.save(); durable: fsynced, renamed, directory fsynced")
        self.options, self._lazy = options, lazy
        self.stats: list[ckpt.SaveStats] = []
        self.arena_pinned = False  # in the last save

    def begin(self, state: State, path: Path) -> None:
        self.pending = ckpt.save(state, path, lazy=self._lazy, options=self.options)

    def finish(self) -> float:
        self.pending.result()
        self.stats.append(self.pending.stats)
        self.arena_pinned = all(file.job.stats["arena_pinned"] for file in self.pending._files)
        return self.pending.stats.durable_at or math.nan

    def wait_released(self) -> None:
        """Until all bytes have left the device: nothing reads its memory any more."""
        for file in self.pending._files:
            if not file.job.wait_released(self.options.timeout_s):
                raise TimeoutError("the copies from the device have not ended")


class Nothing(Saver):
    """What the clocks see where there is nothing to see."""

    def __init__(self) -> None:
        super().__init__(NOTHING, "nothing")

    def begin(self, state: State, path: Path) -> None:
        pass


class TorchSave(Saver):
    one_file = True

    def __init__(self) -> None:
        super().__init__(TORCH, "open, torch.save, flush, os.fsync")

    def begin(self, state: State, path: Path) -> None:
        torch_save_durable(state, path)
        self._ended = clock()

    def finish(self) -> float:
        return self._ended


class DcpSave(Saver):
    def __init__(self) -> None:
        super().__init__(DCP, "torch.distributed.checkpoint.save with FileSystemWriter's defaults, which fsync the data")

    def begin(self, state: State, path: Path) -> None:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path))
        self._ended = clock()

    def finish(self) -> float:
        return self._ended


class DcpAsync(Saver):
    """DCP's async_save, with the stager that `make_stager` makes; None: its own default, which copies inside the call."""

    def __init__(self, name: str, kind: AsyncCheckpointerType, make_stager: Callable[[], Any] | None, how: str) -> None:
        super().__init__(name, f"torch.distributed.checkpoint.async_save, {kind.value}, {how}; FileSystemWriter's defaults")
        self._kind, self._make_stager = kind, make_stager
        self._stager: Any = None
        self._staged: Future[Any] | None = None
        self._ended = math.nan

    def begin(self, state: State, path: Path) -> None:
        if self._make_stager is not None and self._stager is None:
            self._stager = self._make_stager()
        writer = dcp.FileSystemWriter(path)
        answer = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=self._kind, async_stager=self._stager)
        self._staged, self._written = None, answer
        if isinstance(answer, AsyncSaveResponse):
            self._staged, self._written = answer.staging_completion, answer.upload_completion
        self._written.add_done_callback(self._note_end)

    def _note_end(self, _: Future[Any]) -> None:
        self._ended = clock()

    def before_step(self) -> None:
        if self._staged is not None:
            self._staged.result(DEADLINE_S)

    def finish(self) -> float:
        self._written.result(DEADLINE_S)
        return self._ended

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
            self._stager = None


class DataStates(Saver):
    """The public engine of DataStates-LLM, called as DeepSpeed calls it: wait() before the update, then wait(persist=True)."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(
            DATASTATES, "datastates.CheckpointEngine.save; wait() before the step; wait(persist=True) and os.fsync"
        )
        self._config = {"host_cache_size": math.ceil(1.1 * nbytes / GIB), "parser_threads": 4}
        self._engine: Any = None

    def begin(self, state: State, path: Path) -> None:
        if self._engine is None:
            import datastates

            self._engine = datastates.CheckpointEngine(self._config, 0)
        self._path = path
        self._engine.save(state, str(path))

    def before_step(self) -> None:
        self._engine.wait()

    def finish(self) -> float:
        self._engine.wait(persist=True)
        fsync_path(self._path)
        return clock()


# ---- which there are -------------------------------------------------------------------------------------------------


def pinned_stager(device: Device, nbytes: int, in_background: bool) -> Any:
    """DCP's stager with its fastest options; without a GPU, those of them that work.

    Raises:
        OSError: shared memory has no room for the copy; filling it all the same would kill the process.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < nbytes:
        raise OSError(f"{SHARED_MEMORY} has {free / GIB:.1f} GiB free, and the copy of the state needs {nbytes / GIB:.1f}")
    gpu = not device.stand_in
    options = staging.StagingOptions(
        use_pinned_memory=gpu, use_shared_memory=True, use_async_staging=in_background, use_non_blocking_copy=gpu
    )
    return staging.DefaultStager(options)


def make_rivals(device: Device, nbytes: int) -> list[Saver]:
    def stager(in_background: bool) -> Callable[[], Any]:
        return lambda: pinned_stager(device, nbytes, in_background)

    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    cached = "pinned and shared staging memory that is kept"
    return [
        TorchSave(),
        DcpSave(),
        DcpAsync(DCP_ASYNC, thread, None, "its defaults"),
        DcpAsync(f"{DCP_ASYNC}, process, pinned", process, stager(False), cached),
        DcpAsync(f"{DCP_ASYNC}, process, pinned, staged in background", process, stager(True), f"{cached}, filled by a thread"),
        DataStates(nbytes),
    ]


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """The process group that DCP's process wants; ends that process, too. Where none can be made, those who want it fail."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each tensor that is shared with that process holds a descriptor
    with tempfile.TemporaryDirectory() as directory:
        try:
            dist.init_process_group("gloo", store=dist.FileStore(f"{directory}/store", 1), rank=0, world_size=1)
        except (RuntimeError, ValueError) as error:
            print(f"no process group can be made here: {error}", file=sys.stderr)
        try:
            yield
        finally:
            _async_process_executor._CHECKPOINT_PROCESS = None
            if dist.is_initialized():
                dist.destroy_process_group()
