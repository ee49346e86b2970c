"""One tensor by itself on its way to a file: the bytes from its first element to its last."""

from __future__ import annotations

import torch
from torch.serialization import location_tag

from ckpt._native import SavedStorage
from ckpt.plan.views import ByteInterval


def record_of(tensor: torch.Tensor, interval: ByteInterval) -> SavedStorage:
    """
    Args:
        interval: the bytes of its storage.
    """
    storage = tensor.untyped_storage()
    record = SavedStorage(storage, "0", tensor.dtype, tensor, interval.high - interval.low)
    if record.nbytes != storage.nbytes():
        record.low, record.views = interval.low, [interval]
    if not tensor.is_cpu:
        record.location = location_tag(storage)
    return record
