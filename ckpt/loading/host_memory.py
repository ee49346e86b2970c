"""Host memory for the records of a file."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

import torch

# Storages from this size get pages of their own: they lie as in the file, and are first touched by the threads that read.
_LARGE = 256 * 1024
ALIGNMENT = 64  # bytes: of storages, as torch's allocator has it
_HUGE_PAGE = 2 << 20


def allocate(nbytes: int, offset: int, large: int = _LARGE, alignment: int = ALIGNMENT) -> torch.UntypedStorage:
    """Memory whose address is congruent to `offset` modulo a page, if that is a multiple of `alignment`, and there are `large`
    bytes of it; not touched yet.

    In huge pages if torch is told to have such for its own (THP_MEM_ALLOC_ENABLE=1), and not of our own accord: where the host
    of a virtual machine takes free ones back, the first touch of one costs several times as much as those of 512 small ones.

    It cannot be resized: torch would do so for a tensor that reaches beyond its end, which a forged pickle may ask for.
    """
    if nbytes < large:
        return fixed(torch.UntypedStorage(nbytes))
    lead = offset % mmap.PAGESIZE
    if lead % alignment:
        lead = 0
    try:
        pages = mmap.mmap(-1, lead + nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # the kernel's limit on the number of mappings
        return fixed(torch.UntypedStorage(nbytes))
    if nbytes >= _HUGE_PAGE and os.getenv("THP_MEM_ALLOC_ENABLE") == "1":
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=lead).untyped_storage()


def fixed(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """The same memory, as a storage that cannot be resized."""
    whole: torch.UntypedStorage = storage[0 : storage.nbytes()]
    return whole


def bytes_of(storage: torch.UntypedStorage) -> bytes:
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
