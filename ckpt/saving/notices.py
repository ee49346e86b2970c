"""What is said about saves in the log: no direct I/O, an arena that is not pinned, fences that take long.

And of shards in a state that only as many ranks can restore; and what a save has shown about its devices, which the next one
goes by.
"""

from __future__ import annotations

import logging
import os

from ckpt import device_modes
from ckpt.devices import HOST
from ckpt.fence import iteration_s
from ckpt.plan.shards import find_shards
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.task import SaveTask

logger = logging.getLogger("ckpt")

_NOT_DIRECT = (1, 1)  # as Job.limits
noted_pageable: set[str] = set()
noted_buffered: set[int] = set()  # devices of file systems
noted_shards: set[str] = set()  # the classes of such tensors
noted_fences: list[float] = []  # the part of an iteration that the last saves were held for, as long as that was too long
_LONG_FENCE = 0.05  # of an iteration
_LONG_FENCES = 3  # in a row, before it is said: the first saves of a run are not like the others


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


def note_shards(file: FileInFlight) -> None:
    """Says once, of a rank's own state, that it holds tensors of which each rank has a part, if it does."""
    if not noted_shards and (kind := find_shards(file.pickle)) is not None:
        noted_shards.add(kind)
        logger.warning(
            "state= holds a %s, of which each rank has a part: it is saved, but only as many ranks as now can restore it. For "
            "any number of them give it as sharded=, in the form of torch.distributed.checkpoint.state_dict.get_state_dict(), "
            "and take it back by restore(sharded_into=...)",
            kind,
        )


def note_devices(task: SaveTask) -> None:
    """Of a save that has ended: whether its bytes of devices were right, as far as that was looked at."""
    proofs: dict[tuple[int, device_modes.Mode], bool] = {}  # once for a save, however many files it has
    for file in task.files:
        mode = file.device_mode
        if mode not in ("lazy", "ordered"):
            continue
        if file.changed_device != HOST:
            device_modes.note_wrong(
                file.changed_device, mode, f"the save to '{file.target}' had other bytes than inside save()"
            )
        right = file.was_proof and file.job.error is None and file.changed_device == HOST
        for device in file.devices:
            proofs[device, mode] = proofs.get((device, mode), True) and right
    for (device, mode), right in proofs.items():
        if right:
            device_modes.note_right([device], mode)


def note_fences(task: SaveTask) -> None:
    """Says once that fences hold training up for more than a small part of an iteration, and what helps."""
    iteration = iteration_s()
    if not task.files or iteration is None or len(noted_fences) > _LONG_FENCES:
        return
    stats = [file.job.stats for file in task.files]
    held = sum(each["fence_s"] for each in stats)
    if held <= _LONG_FENCE * iteration:
        noted_fences.clear()
        return
    noted_fences.append(held / iteration)
    if len(noted_fences) < _LONG_FENCES:
        return
    noted_fences.append(0.0)  # said
    waited = sum(each["arena_wait_s"] for each in stats)
    size = max(each["arena_bytes"] for each in stats) / 2**30
    wanted = sum(each["bytes_total"] for each in stats) / 2**30
    advice = (
        f"{min(waited, held):.3g} s of that for room in the arena of {size:.3g} GiB: set Options.arena_bytes to the size of "
        f"the state, {wanted:.3g} GiB, if the node has the memory, or save less often"
        if waited > held / 2
        else "since the bytes do not leave within an iteration: save less often, or take spare memory of the device for what "
        "has not left (Options.device_cache)"
    )
    logger.warning(
        "the fences of the last %d saves took more than %d %% of an iteration (of this one %.3g s of %.3g s), %s",
        _LONG_FENCES,
        100 * _LONG_FENCE,
        held,
        iteration,
        advice,
    )
