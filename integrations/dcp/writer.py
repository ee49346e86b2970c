"""LazyStorageWriter: what torch has planned, written by this library's engine."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.storage import WriteResult

import ckpt
from ckpt.dcp import ItemFiles, ItemWriter, publish_metadata
from ckpt.errors import CaptureError, UnsupportedError

from . import torch_private
from .notices import say_once
from .stager import StagedState, take_staged

_PREFIX = re.compile(r"__(\d+)_")


class LazyStorageWriter(FileSystemWriter):
    """A storage writer for `torch.distributed.checkpoint.save` and `async_save`, with any planner.

    Each rank's tensors go to one file, straight from their memory, and what torch has turned into bytes to another one. Both
    are durable when the plan is written, with checksums beside them; then `.metadata` is, which replaces that of a former
    checkpoint at once, and the former files are removed.

    Args:
        path: the directory.
        options: see ckpt.Options.
        more: as of FileSystemWriter. With extensions, with safetensors, and without collectives torch writes by itself.
    """

    def __init__(self, path: str | os.PathLike[str], options: ckpt.Options | None = None, **more: Any) -> None:
        super().__init__(path, **more)
        self._options = options

    def prepare_local_plan(self, plan: Any) -> Any:
        if self._leaves_it_to_torch():
            return super().prepare_local_plan(plan)
        metadata = Path(self.path) / ".metadata"
        if not getattr(self, "overwrite", True) and metadata.exists():
            raise RuntimeError(f"there is a checkpoint in '{self.path}', and overwrite is False")
        return plan

    def write_data(self, plan: Any, planner: Any) -> Any:
        staged = take_staged()
        try:
            if staged is not None:
                staged.tensors.await_copies()
            prefix = _PREFIX.fullmatch(torch_private.prefix_of(plan) or "")
            if self._leaves_it_to_torch() or prefix is None:
                written = super().write_data(plan, planner)  # fences wait for all of it
                if staged is not None:
                    self._let_go(staged)
                return written
            return self._write(plan, planner, int(prefix[1]), staged)
        finally:
            if staged is not None:
                staged.finish()

    def _leaves_it_to_torch(self) -> bool:
        reason = ""
        if torch_private.has_extensions(self):
            reason = "extensions transform its bytes"
        elif torch_private.writes_safetensors(self):
            reason = "it is to be safetensors"
        elif not getattr(self, "use_collectives", True):
            reason = "use_collectives is False"
        elif torch_private.StorageInfo is None:
            reason = f"torch {torch.__version__} is not as those that were tested"
        if reason:
            say_once(f"LazyStorageWriter leaves the writing to torch, because {reason}")
        return bool(reason)

    def _write(self, plan: Any, planner: Any, rank: int, staged: StagedState | None) -> Any:
        written = ItemWriter(Path(self.path), rank, self._options)
        tensors, blobs, of_tensors, of_blobs = [], [], [], []
        with torch.no_grad():
            for item in plan.items:
                data = planner.resolve_data(item)
                if isinstance(data, torch.Tensor):
                    _refuse_unreadable(item.index.fqn, data)
                    tensors.append((data, staged is None or not staged.tensors.is_live(data)))
                    of_tensors.append(item)
                else:
                    blobs.append(data.getvalue())
                    of_blobs.append(item)

        files = written.write(tensors, blobs)
        tensors.clear()
        try:
            # Only now: as long as nothing is submitted, a step of an optimizer must wait for it.
            if staged is not None:
                self._let_go(staged)
            if files.pending is not None:
                if staged is not None:
                    files.pending.add_captured_callback(lambda _: staged.finish())
                files.pending.result()
        except BaseException:
            if files.pending is not None:
                files.pending.exception()
            written.discard(sorted({name for name, _, _ in (*files.tensors, *files.blobs)}))
            raise
        return _results(files, of_tensors, of_blobs)

    def _let_go(self, staged: StagedState) -> None:
        """Steps of optimizers may go on, for which fences look at what was submitted."""
        changed = staged.changed()
        if not staged.tensors.release():
            raise CaptureError(
                f"the save to '{self.path}' was given up: a step of an optimizer has waited for torch to plan it, longer than "
                "Options.timeout_s. Does async_save() share its process group with the training?"
            )
        if changed is not None:
            raise CaptureError(
                f"{changed} was changed before its bytes were captured by the save to '{self.path}'; nothing was published. "
                "Call ckpt.fence() before code that writes to tensors outside an optimizer step"
            )

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        if self._leaves_it_to_torch():
            return super().finish(metadata, results)
        if torch_private.VERSION is not None:
            metadata.version = torch_private.VERSION
        metadata.storage_data = {result.index: result.storage_data for each in results for result in each}
        metadata.storage_meta = self.storage_meta()
        used: dict[str, int] = {}
        for info in metadata.storage_data.values():
            used[info.relative_path] = max(used.get(info.relative_path, 0), info.offset + info.length)
        publish_metadata(Path(self.path), pickle.dumps(metadata), used)


def _refuse_unreadable(key: str, tensor: torch.Tensor) -> None:
    """As torch does, by accident: it could not load it."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        what = "on the meta device" if tensor.is_meta else f"of {tensor.layout}"
        raise UnsupportedError(f"cannot save '{key}': torch.distributed.checkpoint loads no tensors {what}")


def _results(files: ItemFiles, of_tensors: list[Any], of_blobs: list[Any]) -> Any:
    results = []
    for items, places in ((of_tensors, files.tensors), (of_blobs, files.blobs)):
        for item, (name, at, length) in zip(items, places, strict=True):
            info = torch_private.StorageInfo(name, at, length)
            results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=info))
    future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
    future.set_result(results)
    return future
