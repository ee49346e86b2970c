"""What tests and measurements look at inside: engines, saves in flight, and what is noted of optimizers.

Everything that reads private members of this package from outside stands here, so that they can change in one place.
"""

from __future__ import annotations

from typing import Any

from ckpt.fence import _beginning, _running, _stepped, _uncaptured
from ckpt.options import Options
from ckpt.saving import notices, runtime
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.pending import PendingSave
from ckpt.saving.task import SaveTask

# ---- engines ---------------------------------------------------------------------------------------------------------


def engine_for(options: Options) -> Any:
    """The native engine that saves of single files with these options use; made if there is none yet."""
    return runtime.keep(options)[0]._engine


def engine_of(checkpointer: Any) -> Any:
    """The native engine of a Checkpointer or BundleCheckpointer; None once that is closed for good."""
    return checkpointer._runtime._engine


def engine_count() -> int:
    """How many engines this process keeps."""
    return len(runtime._runtimes)


def close_engines(timeout_s: float) -> None:
    """Drains and ends every engine that this process keeps, with its threads and its arena."""
    with runtime._registry_lock:
        runtimes = list(runtime._runtimes.values())
        runtime._runtimes.clear()
    for each in runtimes:
        each.close(timeout_s)


# ---- saves in flight -------------------------------------------------------------------------------------------------


def task_of(pending: PendingSave) -> SaveTask:
    """What a PendingSave looks at."""
    return pending._task


def files_of(pending: PendingSave) -> tuple[FileInFlight, ...]:
    """The files that this process writes for a save."""
    return pending._task.files


def pending_of(checkpointer: Any) -> list[PendingSave]:
    """The saves that a Checkpointer or BundleCheckpointer still remembers."""
    return [PendingSave(task) for task in checkpointer._pending]


def places_taken(checkpointer: Any) -> int:
    """Of those that Options.max_in_flight allows; a save gives its place back once it has cleared up."""
    return checkpointer._finisher._in_flight


def is_idle(checkpointer: Any) -> bool:
    """Whether every save that was handed to the background has its outcome."""
    return checkpointer._finisher.wait_idle(0)


def forget_failures(checkpointer: Any) -> None:
    """As if no save had failed: close() does not raise the last error."""
    checkpointer._last_failed = None


def coordinator_of(checkpointer: Any) -> Any:
    """By what its ranks agree."""
    return checkpointer._coordinator


def being_removed(checkpointer: Any) -> set[str]:
    """The step directories that a Checkpointer is just taking away."""
    return checkpointer._directories._in_flight.being_removed


def known_limits(checkpointer: Any) -> tuple[int, int] | None:
    """What direct I/O was found to demand in the directory of a Checkpointer."""
    return checkpointer._directories._limits


# ---- fences and optimizers -------------------------------------------------------------------------------------------


def uncaptured() -> int:
    """How many files fences have to look after."""
    return len(_uncaptured)


def beginning() -> int:
    """How many saves are just looking for what is lazy."""
    return len(_beginning)


def running_steps() -> int:
    """How many steps of optimizers are running, or have ended and have not been forgotten."""
    return len(_running)


def known_optimizers() -> int:
    """How many optimizers have stepped, and still live."""
    return len(_stepped)


# ---- what is said once -----------------------------------------------------------------------------------------------


def forget_notices() -> None:
    """What a process says once (no direct I/O, no pinned memory) is said again."""
    notices.noted_buffered.clear()
    notices.noted_pageable.clear()
