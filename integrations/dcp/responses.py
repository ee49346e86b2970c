"""What async_save() returns: a future for each of the two promises of a save."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import torch.distributed.checkpoint as stock

import ckpt


class _PlainResponse:
    """For versions of torch that have no AsyncSaveResponse."""

    def __init__(self, staging_completion: Any, upload_completion: Any) -> None:
        self.staging_completion, self.upload_completion = staging_completion, upload_completion


_Response: Any = getattr(getattr(stock, "state_dict_saver", None), "AsyncSaveResponse", _PlainResponse)


class SaveResponse(_Response):
    """An AsyncSaveResponse of torch, and the future that async_save() of torch returns by default: that of its upload."""

    upload_completion: Any

    def result(self, timeout: float | None = None) -> Any:
        return self.upload_completion.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        found: BaseException | None = self.upload_completion.exception(timeout)
        return found

    def done(self) -> bool:
        return bool(self.upload_completion.done())

    def running(self) -> bool:
        return bool(self.upload_completion.running())

    def cancelled(self) -> bool:
        return bool(self.upload_completion.cancelled())

    def cancel(self) -> bool:
        return bool(self.upload_completion.cancel())

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self.upload_completion.add_done_callback(callback)


def response(staging: Any, upload: Any) -> SaveResponse:
    return SaveResponse(staging_completion=staging, upload_completion=upload)


class StagingFuture(concurrent.futures.Future):
    """Done when the tensors may change. It never fails: if the save has, they may change, too."""

    def __init__(self, pending: ckpt.PendingSave) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._pending = pending
        pending.add_captured_callback(lambda _: self.set_result(None))

    def done(self) -> bool:
        self._pending.wait_captured(0)
        return super().done()

    def result(self, timeout: float | None = None) -> None:
        if not self._pending.wait_captured(timeout):
            raise concurrent.futures.TimeoutError
        return super().result()

    def exception(self, timeout: float | None = None) -> None:
        self.result(timeout)


class UploadFuture(concurrent.futures.Future):
    """Done when the checkpoint is durable; its result is the metadata."""

    def __init__(self, pending: ckpt.PendingSave) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._path = pending.path
        self._metadata: Any = None
        pending.add_done_callback(self._end)

    def _end(self, pending: ckpt.PendingSave) -> None:
        error = pending.exception()
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        super().result(timeout)
        if self._metadata is None:  # read when somebody wants it: that of a large job is large
            self._metadata = metadata_of(self._path)
        return self._metadata


def metadata_of(path: Any) -> Any:
    return stock.FileSystemReader(path).read_metadata()
