"""save(): one file, saved by this process alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.formats.by_suffix import format_of
from ckpt.metrics.noting import note_save
from ckpt.metrics.record import outcome_of
from ckpt.options import Options
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.pending import PendingSave
from ckpt.saving.runtime import keep
from ckpt.saving.submit import log_failure, start
from ckpt.saving.task import SaveTask
from ckpt.storage import durable, free_space

_DEFAULT = Options()


def save(
    obj: Any,
    path: str | os.PathLike[str],
    *,
    lazy: Any = None,
    options: Options | None = None,
    metadata: Mapping[str, str] | None = None,
) -> PendingSave:
    """Saves `obj` to `path` in the background, as a file that stock `torch.load` reads; or, if it is called "*.safetensors", as
    the one that `safetensors.torch.save_file` writes.

    Returns within milliseconds. Python values are pickled, and tensors that anything may write to are copied, before it
    returns. Lazy tensors are not copied: they must not change before the next fence, which comes by itself before every step
    of a `torch.optim.Optimizer`. Lazy are the parameters and the state of optimizers that have stepped, and what `lazy`
    declares, unless they are small and in host memory (`Options.eager_bytes`).

    Args:
        obj: anything that `torch.save` can save; for "*.safetensors" a dict of names and dense, contiguous tensors of which no
            two share memory; or a module, of which the file is what `safetensors.torch.save_model` writes.
        path: the file to create or replace, atomically, once all is durable. Its directory must exist. What is replaced keeps
            its permissions.
        lazy: more that changes only behind a fence: tensors, modules (their parameters), optimizers, iterables of these, or
            True: the caller promises that nothing in `obj` changes before the next fence. False: copy everything inside
            save(), for states that something other than an optimizer's step writes to.
            Tensors in shared memory are lazy only if they, their module or True declare that no other process writes to them.
        metadata: texts by names, for the header of a "*.safetensors" file, as of save_file: `{"format": "pt"}`.
        options: see Options. Saves with the same arena, chunk and writer options share one engine. `record_alignment` is for
            files of torch's format alone.

    Returns:
        The save on its way; see PendingSave.

    Raises:
        StorageError: the file cannot be created, or what is there is no regular file. Later errors are raised by `result()`,
            and logged.
        DeviceError: a current stream of a CUDA device is being captured into a graph; with `Options.device_lazy=True`, the
            driver is missing or fails. Later errors are the result's.
        FailedSavesError, ClosedError: no more saves are taken.
        UnsupportedError: `obj` does not fit a safetensors file; says what of it, and what to do. Nothing was written.
        TypeError, ValueError: an argument is not what it should be; also what pickling `obj` raises.
    """
    options = options or _DEFAULT
    target = Path(os.path.abspath(os.fsdecode(path)))
    made = format_of(target, metadata)  # by the name that was given, not by that of what a link leads to
    target = durable.file_target(target)
    durable.directory_of_target(target)
    task = SaveTask(target, on_done=_note_done)

    directory = durable.Directory(target.parent)
    file = FileInFlight(target, directory=directory, made=made)

    def publish(error: BaseException | None) -> Path:
        if error is not None:
            raise error
        durable.crash_point("before-rename")
        if free_space.has_room(directory.reach, options.max_in_flight * file.job.size):
            task.afterwards = free_space.keep_space(file.reach(target))
        durable.rename_durably(file.reach(file.temporary), file.reach(target))
        durable.crash_point("renamed")
        return directory.now() / target.name

    durable.remove_stale(target)
    start(*keep(options), task, [(file, obj, True)], publish, lazy=lazy, options=options)
    return PendingSave(task)


def _note_done(task: SaveTask, error: BaseException | None) -> None:
    log_failure(task, error)
    note_save(outcome_of(error), PendingSave(task).stats)
