"""Samplers of torch that know how far training has come, and go on from there.

A sampler hands out indices; a DataLoader with workers asks for them some batches ahead of what training has got. So what counts
is how many batches the loader's iterator has given away. It is found on the stack when the sampler is asked for an index.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler, SequentialSampler

from . import torch_private

logger = logging.getLogger("ckpt")

_MOST_FRAMES = 8  # between a sampler and its loader: a batch sampler or two


def make_resumable(sampler: Any) -> Any:
    """The same object, which has state_dict() and load_state_dict() from now on: epoch and position, in samples.

    Any other object is returned as it is; so is a sampler that has these methods, or whose order cannot be repeated: one that
    has neither set_epoch() nor a `generator`. Random ones without a generator get one of their own.
    """
    if not _is_sampler(sampler) or hasattr(sampler, "state_dict"):
        return sampler
    has_epochs, has_generator = hasattr(sampler, "set_epoch") and hasattr(sampler, "epoch"), hasattr(sampler, "generator")
    if not (has_epochs or has_generator or type(sampler) is SequentialSampler):
        return sampler
    if has_generator and sampler.generator is None:
        sampler.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    kind: Any = type(sampler)
    sampler.__class__ = _resumable_class(kind)
    sampler._progress = _Progress(sampler)
    return sampler


def _is_sampler(item: Any) -> bool:
    return isinstance(item, Sampler)


@functools.cache
def _resumable_class(kind: Any) -> Any:
    class Resumable(kind):
        _progress: _Progress

        def __iter__(self) -> Iterator[Any]:
            return self._progress.indices(super().__iter__)

        def set_epoch(self, epoch: int) -> None:
            self._progress.note_epoch(epoch)
            super().set_epoch(epoch)

        def state_dict(self) -> dict[str, Any]:
            """`epoch`; `position`: samples of it that training has got; and what makes the order the same again.

            To be asked inside the loop over the data, or behind its end. Behind a `break` workers may have fetched more.
            """
            return self._progress.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if hasattr(self, "epoch"):
                super().set_epoch(state["epoch"])
            self._progress.load_state_dict(state)

    Resumable.__name__ = Resumable.__qualname__ = f"Resumable{kind.__name__}"
    return Resumable


class _Progress:
    """How far the training is that a sampler hands out indices for. Where it knows no epochs, each pass is one."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = weakref.ref(sampler)
        self._skip = 0  # samples of the next pass that training has had
        self._order: torch.Tensor | None = None  # state of the generator at the beginning of the pass
        self._begun_at = 0  # samples that were skipped in this pass
        self._handed_out = 0  # samples of this pass, those included
        self._passes = 0
        self._iterator: weakref.ref[Any] | None = None

    def indices(self, begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        generator = getattr(self._sampler(), "generator", None)
        skip, self._skip = self._skip, 0
        if generator is not None and skip and self._order is not None:
            generator.set_state(self._order)
        elif generator is not None:
            self._order = generator.get_state()
        self._passes += not skip
        self._begun_at = self._handed_out = skip
        self._iterator = _find_iterator()
        for index in itertools.islice(begin(), skip, None):
            self._handed_out += 1
            yield index

    def note_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            if self._skip:
                logger.warning("the data were resumed in epoch %d, and begin anew in epoch %d", self._epoch, epoch)
            self._skip = self._begun_at = self._handed_out = 0
            self._iterator = None

    @property
    def _epoch(self) -> int:
        return int(getattr(self._sampler(), "epoch", max(self._passes - 1, 0)))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position(), "passes": self._passes, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skip = self._handed_out = self._begun_at = state["position"]
        self._passes, self._order, self._iterator = state["passes"], state["order"], None

    def _position(self) -> int:
        iterator = None if self._iterator is None else self._iterator()
        if iterator is None:
            return self._handed_out
        yielded, size = torch_private.batches_given_away(iterator), _batch_size(iterator)
        if yielded is not None and size is not None:
            return min(self._begun_at + yielded * size, self._handed_out)
        if not torch_private.has_workers(iterator):
            return self._handed_out
        raise TypeError(
            "how far training has come cannot be told for a DataLoader with workers and a batch sampler of another kind; use "
            "torchdata's StatefulDataLoader"
        )


def _batch_size(iterator: Any) -> int | None:
    """Samples in a batch of a loader; None if that may vary."""
    sampler = torch_private.index_sampler(iterator)
    if hasattr(sampler, "_progress"):
        return 1  # the loader makes no batches
    return int(sampler.batch_size) if type(sampler) is BatchSampler else None


def _find_iterator() -> weakref.ref[Any] | None:
    """That of the loader that has asked for the first index; None if it was not a loader."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return None
        candidate = frame.f_locals.get("self")
        if torch_private.is_loader_iterator(candidate):
            return weakref.ref(candidate)
        frame = frame.f_back
    return None
