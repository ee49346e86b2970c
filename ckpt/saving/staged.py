"""Tensors that will be saved by another thread, later: what changes behind fences alone stays where it is meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckpt.fence import Hold, beginning
from ckpt.options import Options
from ckpt.plan.lazy_storages import lazy_storages
from ckpt.plan.save_plan import LAZY
from ckpt.sharded.planning import plan_tensors


class StagedTensors:
    """Copies all but those that are lazy, now. Fences wait until release(), which is to follow the submission of the lazy ones.

    Args:
        tensors: plain ones.

    Attributes:
        tensors: in their places, the same ones where they are lazy, and copies of the others.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], options: Options | None = None) -> None:
        options = options or Options()
        with beginning(), torch.no_grad():  # no fence may pass between the question and the hold
            lazy = _which_are_lazy(tensors, options)
            self.tensors = [tensor if index in lazy else tensor.detach().clone() for index, tensor in enumerate(tensors)]
            self._live = {tensors[index].untyped_storage().data_ptr() for index in lazy}
            self._hold = Hold(options.timeout_s) if self._live else None

    def is_live(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in memory that may change behind the next fence."""
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self._live

    def release(self) -> bool:
        """False if a fence has given up waiting: then nothing of it may be saved. Safe to call again."""
        return self._hold is None or self._hold.release()


def _which_are_lazy(tensors: Sequence[torch.Tensor], options: Options) -> set[int]:
    """Their numbers. What lies on devices is copied there: who submits it later does so on another stream."""
    on_host = [index for index, tensor in enumerate(tensors) if tensor.is_cpu]
    pairs = ((tensors[index], False) for index in on_host)
    plan = plan_tensors(pairs, lazy_storages(None), options.size("eager_bytes"), False)
    counts = () if plan.archives is None else plan.archives.records_of
    found, at = set(), 0
    for index, count in zip(on_host, counts, strict=True):
        if count and all(kind == LAZY for kind in plan.kinds[at : at + count]):
            found.add(index)
        at += count
    return found
