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
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import _async_process_executor, staging
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import ckpt
from bench.gpu.device import Device
from bench.measure.disk_pages import fsync_path
from bench.measure.sampling import GIB, clock
from bench.rivals.base import Rival
from bench.rivals.dcp import DcpAsync, DcpSaveInGroup, InGroup
from bench.rivals.torch_save import TorchSave
from ckpt.saving import inspection

NOTHING = "nothing saved"
TORCH, DCP, DCP_ASYNC, DATASTATES = TorchSave.name, DcpSaveInGroup.name, "DCP async_save", "DataStates"
SHARED_MEMORY = Path("/dev/shm")

State = dict[str, Any]


class CkptFile(Rival):
    """One file, by `ckpt.save`.

    Attributes:
        stats: of each save.
        arena_pinned: in the last save.
    """

    configuration = "ckpt.save(); durable: fsynced, renamed, directory fsynced"
    copies = 0
    ours = one_file = True

    def __init__(self, directory: Path, name: str, options: ckpt.Options, lazy: Any) -> None:
        super().__init__(directory, keep=0)
        self.name, self.options, self._lazy = name, options, lazy
        self.stats: list[ckpt.SaveStats] = []
        self.arena_pinned = False

    def save(self, state: State) -> None:
        self._saves += 1
        self.pending = ckpt.save(state, self.newest, lazy=self._lazy, options=self.options)

    def finish(self) -> None:
        self.pending.result()
        self.stats.append(self.pending.stats)
        self.arena_pinned = all(file.job.stats["arena_pinned"] for file in inspection.files_of(self.pending))
        self.durable_at = self.pending.stats.durable_at or math.nan

    def wait_released(self) -> None:
        """Until all bytes have left the device: nothing reads its memory any more."""
        for file in inspection.files_of(self.pending):
            if not file.job.wait_released(self.options.timeout_s):
                raise TimeoutError("the copies from the device have not ended")

    def close(self) -> None:
        """Nothing: the engine is the library's."""


class Nothing(Rival):
    """What the clocks see where there is nothing to see."""

    name, configuration = NOTHING, "nothing"
    copies = 0

    def _begin(self, state: State, path: Path) -> None:
        pass


class DcpAsyncInGroup(InGroup, DcpAsync):
    """DCP's async_save, with the stager that `make_stager` makes; None: its own default, which copies inside the call."""

    def __init__(
        self, directory: Path, name: str, kind: AsyncCheckpointerType, make_stager: Callable[[], Any] | None, how: str
    ) -> None:
        super().__init__(directory, keep=0)
        self.name, self.kind = name, kind
        self.configuration = f"torch.distributed.checkpoint.async_save, {kind.value}, {how}; FileSystemWriter's defaults"
        self._make = make_stager

    def _make_stager(self) -> Any:
        return None if self._make is None else self._make()


class DataStates(Rival):
    """The public engine of DataStates-LLM, called as DeepSpeed calls it: wait() before the update, then wait(persist=True)."""

    name = DATASTATES
    configuration = "datastates.CheckpointEngine.save; wait() before the step; wait(persist=True) and os.fsync"

    def __init__(self, directory: Path, nbytes: int) -> None:
        super().__init__(directory, keep=0)
        self._config = {"host_cache_size": math.ceil(1.1 * nbytes / GIB), "parser_threads": 4}
        self._engine: Any = None
        self._unfinished = False

    def _begin(self, state: State, path: Path) -> None:
        if self._engine is None:
            import datastates

            if not hasattr(datastates, "CheckpointEngine"):
                raise ImportError("this datastates is too old: it cannot say when a checkpoint is on the disk")
            self._engine = datastates.CheckpointEngine(self._config, 0)
        self._unfinished = True
        self._engine.save(state, str(path))

    def before_step(self) -> None:
        self._engine.wait()

    def finish(self) -> None:
        if self._unfinished:
            self._unfinished = False
            self._engine.wait(persist=True)
            fsync_path(self.newest)
            self.durable_at = clock()

    def close(self) -> None:
        """Nothing: it has no call for that."""


# ---- which there are -------------------------------------------------------------------------------------------------


def pinned_stager(device: Device, nbytes: int, in_background: bool, shared: bool = True) -> Any:
    """DCP's stager with its fastest options; without a GPU, those of them that work.

    Args:
        shared: with another process, which writes.

    Raises:
        OSError: shared memory has no room for the copy; filling it all the same would kill the process.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free
    if shared and free < nbytes:
        raise OSError(f"{SHARED_MEMORY} has {free / GIB:.1f} GiB free, and the copy of the state needs {nbytes / GIB:.1f}")
    gpu = not device.stand_in
    options = staging.StagingOptions(
        use_pinned_memory=gpu, use_shared_memory=shared, use_async_staging=in_background, use_non_blocking_copy=gpu
    )
    return staging.DefaultStager(options)


def make_rivals(device: Device, nbytes: int, directory: Path) -> list[Rival]:
    """Each in a directory of its own, where it keeps nothing."""

    def stager(in_background: bool, shared: bool = True) -> Callable[[], Any]:
        return lambda: pinned_stager(device, nbytes, in_background, shared)

    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    pinned, background = f"{DCP_ASYNC}, process, pinned", f"{DCP_ASYNC}, process, pinned, staged in background"
    by_thread = f"{DCP_ASYNC}, thread, pinned, staged in background"
    cached = "pinned and shared staging memory that is kept"
    own = "pinned staging memory that is kept, filled by a thread"
    return [
        TorchSave(directory / "torch", keep=0),
        DcpSaveInGroup(directory / "dcp", keep=0),
        DcpAsyncInGroup(directory / "dcp-thread", DCP_ASYNC, thread, None, "its defaults"),
        DcpAsyncInGroup(directory / "dcp-pinned", by_thread, thread, stager(True, shared=False), own),
        DcpAsyncInGroup(directory / "dcp-process", pinned, process, stager(False), cached),
        DcpAsyncInGroup(directory / "dcp-background", background, process, stager(True), f"{cached}, filled by a thread"),
        DataStates(directory / "datastates", nbytes),
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
