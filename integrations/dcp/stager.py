"""LazyStager: what async_save() of torch is given so that nothing is copied that need not be."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import ckpt
from ckpt.dcp import StagedTensors, is_named_part

_local = threading.local()


class NotStagedError(TypeError):
    """
    Attributes:
        kind: the name of the class of what this does not know.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(f"a {kind} cannot be staged lazily")
        self.kind = kind


class LazyStager:
    """A stager for `torch.distributed.checkpoint.async_save(..., async_stager=, storage_writer=LazyStorageWriter(path))`.

    What optimizers own, and write only behind a fence, stays where it is; all else is copied at once. The next step of an
    optimizer waits until torch has planned the save, and then for what has not left yet. Tensors on devices are copied there.

    The writer must be a LazyStorageWriter, and `async_checkpointer_type` that of threads: another one would read tensors while
    they change.
    """

    _synchronize_after_execute = False  # the fence does

    def __init__(self, options: ckpt.Options | None = None) -> None:
        self._options = options

    @property
    def should_synchronize_after_execute(self) -> bool:
        return self._synchronize_after_execute

    def stage(self, state_dict: Any) -> StagedState:
        """
        Raises:
            TypeError: it holds tensors of a kind that this does not know.
        """
        tensors: list[torch.Tensor] = []
        rebuild = _take_apart(state_dict, tensors)
        staged = StagedTensors(tensors, self._options)
        try:
            return StagedState(rebuild(staged), staged)
        except BaseException:
            staged.release()
            raise

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass


class StagedState(concurrent.futures.Future):
    """Its result is there at once, and names the tensors that training has; it is done when they may change."""

    def __init__(self, state: Any, tensors: StagedTensors) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._placeholder = state
        self.tensors = tensors

    def result(self, timeout: float | None = None) -> Any:
        """For the thread that plans and writes."""
        if not super().done():
            ticket = _Ticket(self)
            _local.ticket = ticket
            # If the thread ends, and has written nothing, torch has given the save up.
            ticket.lost = weakref.finalize(ticket, self.finish)
            ticket.lost.atexit = False
        return self._placeholder

    def changed(self) -> str | None:
        """See StagedTensors."""
        return self.tensors.changed(self._placeholder)

    def finish(self) -> None:
        """Its tensors may change. Safe to call again."""
        self.tensors.release()
        self._placeholder = None
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # somebody else has
            self.set_result(None)


class _Ticket:
    def __init__(self, staged: StagedState) -> None:
        self.staged = staged
        self.lost: Any = None


def take_staged() -> StagedState | None:
    """What the thread that calls is to write; once."""
    ticket = _local.__dict__.pop("ticket", None)
    if ticket is None:
        return None
    ticket.lost.detach()
    return ticket.staged


def _take_apart(value: Any, tensors: list[torch.Tensor]) -> Callable[[StagedTensors], Any]:
    """Adds the tensors of a state to the list; what makes it anew from what becomes of them."""
    number = len(tensors)
    if isinstance(value, DTensor):
        with torch.no_grad():
            local = value.to_local()
        tensors.append(local)

        def make(staged: StagedTensors) -> Any:
            if staged.tensors[number] is local:
                return value
            return DTensor.from_local(
                staged.tensors[number],
                value.device_mesh,
                value.placements,
                run_check=False,
                shape=value.shape,
                stride=value.stride(),
            )

        return make
    if hasattr(value, "__create_write_items__") or type(value).__name__ == "ShardedTensor":
        raise NotStagedError(type(value).__name__)
    if is_named_part(value):  # a copy would not say which
        raise NotStagedError("CheckpointableTensor")
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return lambda staged: staged.tensors[number]
    if isinstance(value, Mapping):
        parts = {key: _take_apart(item, tensors) for key, item in value.items()}
        return lambda staged: {key: part(staged) for key, part in parts.items()}
    if type(value) in (list, tuple):
        items = [_take_apart(item, tensors) for item in value]
        return lambda staged: type(value)(item(staged) for item in items)
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        return lambda _: value
    copied = copy.deepcopy(value)
    return lambda _: copied
