"""What saves and loads a state of which each rank has a part, all ranks together: ours, and torch.distributed.checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist

import ckpt
from bench.measure.sampling import clock
from bench.rivals.base import KEEP, Rival
from bench.rivals.dcp import DEADLINE_S, DcpAsync, DcpSaveInGroup, InGroup
from ckpt.coordinator.torch_store import StoreCoordinator
from ckpt.integrations import dcp

OURS, DROP_IN = "ckpt, save(sharded=)", "ckpt, dcp.async_save"
THREAD, SAVE = "DCP async_save, thread", "DCP save"
KEPT, STAGED = f"{THREAD}, kept stager", f"{THREAD}, asynchronous staging"


class CountingCoordinator(StoreCoordinator):
    """Knows how many bytes this rank has sent to rank 0, by messages that it was asked to send."""

    sent_bytes = 0

    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
        self.sent_bytes += len(payload)
        return super().gather(key, payload, timeout_s)


class CkptSharded(Rival):
    name = OURS
    configuration = "Checkpointer.save(step, sharded=state), Options(); the ranks agree by the store of torch.distributed"
    copies = 0
    ours = True

    def __init__(self, directory: Path, keep: int = KEEP) -> None:
        super().__init__(directory, keep)
        self._pending: ckpt.PendingSave | None = None

    def open(self) -> None:
        self._coordinator = CountingCoordinator()
        self._checkpointer = ckpt.Checkpointer(self.directory, keep=self.keep, coordinator=self._coordinator)

    @property
    def stats(self) -> ckpt.SaveStats:
        """Of the newest save."""
        assert self._pending is not None
        return self._pending.stats

    @property
    def sent_bytes(self) -> int:
        """To rank 0, since it was opened."""
        return self._coordinator.sent_bytes

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        self.durable_at = math.nan
        self._pending = self._checkpointer.save(self._saves, sharded=state)
        self._pending.add_done_callback(self._note_end)

    def _note_end(self, _: ckpt.PendingSave) -> None:
        self.durable_at = clock()

    def finish(self) -> None:
        if self._pending is not None:
            self._pending.result(DEADLINE_S)
            if math.isnan(self.durable_at):  # who waits is told before the callback is
                self.durable_at = clock()

    def load(self, into: dict[str, Any]) -> None:
        found = self._checkpointer.restore(sharded_into=into)
        assert found is not None and found.step == self._saves

    def prune(self) -> None:
        """Nothing: it has done so itself, behind the save."""

    def close(self) -> None:
        self._checkpointer.close()
        self._coordinator.close()


class CkptInPlaceOfDcp(Rival):
    """One at a time: what saves belongs to the module, and ends with close()."""

    name = DROP_IN
    configuration = "ckpt.integrations.dcp.async_save(state, checkpoint_id=path), Options(); loads by its dcp.load"
    copies = 0
    ours = True

    def __init__(self, directory: Path, keep: int = KEEP) -> None:
        super().__init__(directory, keep)
        self._written: Future[Any] | None = None

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        self.durable_at = math.nan
        self._written = dcp.async_save(state, checkpoint_id=path).upload_completion
        self._written.add_done_callback(self._note_end)

    def _note_end(self, _: Future[Any]) -> None:
        self.durable_at = clock()

    def finish(self) -> None:
        if self._written is not None:
            written, self._written = self._written, None
            error = written.exception(DEADLINE_S)  # result() would read the metadata besides
            if error is not None:
                raise error
            if math.isnan(self.durable_at):
                self.durable_at = clock()

    def load(self, into: dict[str, Any]) -> None:
        dcp.load(into, checkpoint_id=self.newest)

    def close(self) -> None:
        super().close()
        dcp.close()


class DcpAsyncInGroup(InGroup, DcpAsync):
    name = THREAD
    configuration = (
        "torch.distributed.checkpoint.async_save by a thread with its defaults, on a gloo group of its own: each save copies "
        "the state to fresh memory; FileSystemWriter's defaults, which fsync the data"
    )

    def open(self) -> None:
        self.group = dist.new_group(backend="gloo")

    def _make_stager(self) -> Any:
        return None

    def close(self) -> None:
        """Nothing but that: a rank that has failed would be waited for in vain."""
        if self._stager is not None:
            self._stager.close()


class DcpAsyncKeptInGroup(DcpAsyncInGroup):
    name = KEPT
    configuration = (
        f"{DcpAsyncInGroup.configuration}; but with one DefaultStager, so that its copy of the state is kept and reused"
    )

    def _make_stager(self) -> Any:
        return DcpAsync._make_stager(self)


class DcpAsyncStagedInGroup(DcpAsyncKeptInGroup):
    name = STAGED
    configuration = f"{DcpAsyncKeptInGroup.configuration}, by a thread of its own (use_async_staging); the step waits for it"
    staging = type(DcpAsync.staging)(False, False, True, False)


RIVALS: tuple[type[Rival], ...] = (
    *(CkptSharded, CkptInPlaceOfDcp, DcpAsyncInGroup, DcpAsyncKeptInGroup, DcpAsyncStagedInGroup),
    DcpSaveInGroup,
)


def chosen(parts: Sequence[str]) -> list[type[Rival]]:
    """Ours, the one that the bars are stated for, and those in whose names one of the parts stands; without parts, all."""
    always = (OURS, DROP_IN, THREAD)
    return [each for each in RIVALS if not parts or each.name in always or any(part in each.name for part in parts)]
