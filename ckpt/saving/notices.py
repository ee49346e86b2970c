"""What a process says once: that a file system has no direct I/O, or that the arena is not pinned."""

from __future__ import annotations

import logging
import os

from ckpt.saving.file_in_flight import FileInFlight

logger = logging.getLogger("ckpt")

_NOT_DIRECT = (1, 1)  # as Job.limits
noted_pageable: set[str] = set()
noted_buffered: set[int] = set()  # devices of file systems


def note_pageable(file: FileInFlight) -> None:
    """Says once that the arena is not pinned, or not all of it, and why."""
    stats = file.job.stats
    cause = stats["pin_failure"]
    if not cause or cause in noted_pageable:
        return
    noted_pageable.add(cause)
    consequence = (
        "only a part of the arena could be pinned: copies from devices have less room, and fences wait longer"
        if stats["arena_pinned"]
        else "the arena could not be pinned: tensors on devices are copied inside save(), which waits for that"
    )
    logger.warning("%s; raise the limit of locked memory (ulimit -l) or choose a smaller arena_bytes: %s", consequence, cause)


def note_buffered(file: FileInFlight) -> None:
    """Says once for each file system that it has no direct I/O."""
    if file.job.error is not None or file.job.stats["direct_io"] or not file.wants_direct:
        return
    if file.limits is not None and file.job.limits != _NOT_DIRECT:  # laid out for something else, this time
        return
    try:
        device = os.stat(file.target.parent).st_dev
    except OSError:
        return
    if device not in noted_buffered:
        noted_buffered.add(device)
        logger.warning(
            "the file system of '%s' has no usable direct I/O: saves go through the page cache, which costs a copy and memory "
            "bandwidth",
            file.target.parent,
        )
