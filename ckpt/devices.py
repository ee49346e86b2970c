"""CUDA devices as torch has them: what lies on which, and the streams on which it computes just now."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.storage import UntypedStorage

HOST = -1
# The file of the CUDA driver; None: the system's. Tests put one of their own here,
driver: str | None = None
# and let host memory play a device's: the device of a storage, or HOST; and the stream of a device.
pretended: Callable[[UntypedStorage], int] | None = None
pretended_stream: Callable[[int], int] | None = None
# and give it out.
pretended_memory: Callable[[int, int], UntypedStorage] | None = None


def index_of(storage: UntypedStorage) -> int:
    """The device whose bytes the engine can fetch itself; HOST for all others."""
    if pretended is not None:
        return pretended(storage)
    if storage.device.type != "cuda" or torch.version.cuda is None:  # ROCm calls its devices so, too
        return HOST
    return int(storage.device.index or 0)


def streams_of(devices: Iterable[int]) -> dict[int, int]:
    """For each device the handle of the stream that is current for this thread."""
    if pretended_stream is not None:
        return {device: pretended_stream(device) for device in devices}
    return {device: int(torch.cuda.current_stream(device).cuda_stream) for device in devices}


def at_work() -> list[int]:
    """The device that this process has begun to use, if any: the engine gets ready for it before the first save."""
    if pretended is None and torch.version.cuda is not None and torch.cuda.is_initialized():
        return [torch.cuda.current_device()]
    return []


# ---- loading ---------------------------------------------------------------------------------------------------------


def holding(tensor: torch.Tensor) -> int:
    """The device that can be sent bytes for the tensor; HOST for all others."""
    if pretended is None and tensor.device.type != "cuda":
        return HOST
    try:
        return index_of(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):  # it has no memory of its own, or not yet
        return HOST


def are_possible() -> bool:
    """Whether this process may have any. Asks no driver: a process that has asked can fork none that computes on devices."""
    return pretended_memory is not None or torch.version.cuda is not None


def index_named(location: str) -> int:
    """The device that files and map_location name so, as in "cuda:1"; HOST for what is none of this process.

    Raises:
        whatever torch says of such a name.
    """
    name, _, number = location.partition(":")
    if name != "cuda" or not are_possible():
        return HOST
    if pretended_memory is not None:
        return int(number or 0)
    if not torch.cuda.is_available():
        return HOST
    named = torch.device(location).index
    index = torch.cuda.current_device() if named is None else int(named)
    return index if index < torch.cuda.device_count() else HOST


def allocate(nbytes: int, device: int) -> UntypedStorage:
    """Memory of the device, of torch's own allocator.

    Raises:
        Exception: there is not enough, or the device cannot be used.
    """
    if pretended_memory is not None:
        return pretended_memory(nbytes, device)
    return UntypedStorage(nbytes, device=f"cuda:{device}")


def strangers(storages: Iterable[UntypedStorage]) -> set[int]:
    """The id() of storages on devices that torch takes for host memory: where that plays a device's."""
    return set() if pretended_memory is None else set(map(id, storages))
