"""Tensors that will be saved by another thread, later: what changes behind fences alone stays where it is meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ckpt import _native
from ckpt import devices as torch_devices
from ckpt._native import SavedStorage
from ckpt.devices import HOST
from ckpt.fence import Hold, beginning
from ckpt.options import Options
from ckpt.plan.change_detector import ChangeDetector
from ckpt.plan.lazy_storages import lazy_storages
from ckpt.plan.pickler import is_plain
from ckpt.plan.save_plan import LAZY
from ckpt.plan.views import byte_interval
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
            lazy, self._records = _which_are_lazy(tensors, options)
            self.tensors = [tensor if index in lazy else _copy(tensor) for index, tensor in enumerate(tensors)]
            self._live = {tensors[index].untyped_storage().data_ptr() for index in lazy}
            self._samples = _sample(self._records)
            devices = {device_of(tensor) for tensor in tensors} - {HOST}
            self._copied = [torch_devices.in_use.mark(device) for device in sorted(devices)]
            self._hold = Hold(options.timeout_s) if self._live else None

    def await_copies(self) -> None:
        """Of what lies on devices: who reads them does so on other streams than those that make them."""
        while self._copied:
            self._copied.pop()()

    def is_live(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in memory that may change behind the next fence."""
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self._live

    def changed(self, state: Any) -> str | None:
        """What of the lazy ones was written to since they were staged, as far as counters and samples tell; None: nothing.

        To be asked between their submission, from which on that looks for writes itself, and release().

        Args:
            state: what holds them, for a name.
        """
        detector = ChangeDetector(state, self._records)
        if (name := detector.changed()) is not None:
            return name
        pairs = zip(self._records, _sample(self._records), self._samples, strict=True)
        found = next((record for record, now, before in pairs if now != before), None)
        return None if found is None else detector.describe(found.tensor)

    def release(self) -> bool:
        """False if a fence has given up waiting: then nothing of it may be saved. Safe to call again."""
        self._records, self._samples = [], []
        return self._hold is None or self._hold.release()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """With its strides, which torch 2.15 notes: clone() alone closes gaps. (Who writes it leaves them out of the file.)"""
    copied = tensor.detach().clone()
    usual = type(copied) is torch.Tensor and copied.layout is torch.strided and not copied.is_quantized and is_plain(tensor)
    if not usual or copied.numel() == 0 or copied.stride() == tensor.stride():
        return copied
    between = byte_interval(0, tensor.shape, tensor.stride(), 1)
    memory = tensor.detach().as_strided((between.high,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride(), 0)


def device_of(tensor: torch.Tensor) -> int:
    return int(tensor.device.index or 0) if tensor.is_cuda else HOST


def _sample(records: Sequence[SavedStorage]) -> list[int]:
    """A checksum of a few bytes of each."""
    there = not torch_devices.in_use.in_host_memory  # else kernels may be about to write to it
    addresses, sizes = [record.address + record.low if there else 0 for record in records], [each.nbytes for each in records]
    return list(memoryview(_native.sample_records(addresses=addresses, sizes=sizes, seed=0)).cast("I"))


def _which_are_lazy(tensors: Sequence[torch.Tensor], options: Options) -> tuple[set[int], list[SavedStorage]]:
    """Their numbers and their records. What lies on devices is copied there: who submits it later does so on another stream."""
    on_host = [index for index, tensor in enumerate(tensors) if tensor.is_cpu and device_of(tensor) == HOST]
    pairs = ((tensors[index], False) for index in on_host)
    plan = plan_tensors(pairs, lazy_storages(None), options.size("eager_bytes"), False)
    counts = () if plan.archives is None else plan.archives.records_of
    found, records, at = set(), list[SavedStorage](), 0
    for index, count in zip(on_host, counts, strict=True):
        if count and all(kind == LAZY for kind in plan.kinds[at : at + count]):
            found.add(index)
            records += plan.records[at : at + count]
        at += count
    return found, records
