"""save, async_save and load, with the signatures of torch.distributed.checkpoint."""

from __future__ import annotations

import concurrent.futures
import os
import warnings
from typing import Any

import torch.distributed.checkpoint as stock

import ckpt
from ckpt.errors import CorruptError, PeerError, UnsupportedError

from . import in_flight, torch_private
from .notices import say_once
from .reader import VerifyingStorageReader
from .responses import StagingFuture, UploadFuture, metadata_of, response
from .sessions import background_group, is_initialized, options, session_of
from .stager import LazyStager, NotStagedError
from .writer import LazyStorageWriter


def save(
    state_dict: Any,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: Any = None,
    planner: Any = None,
    process_group: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Any:
    """Saves, and returns the metadata once all of it is durable on all ranks.

    Raises:
        CheckpointError: what went wrong, on this rank or another one; the checkpoint that was there before is whole.
    """
    reason = _reason_for_torch(checkpoint_id, storage_writer, planner, use_collectives)
    if reason is None:
        _warn_if_alone(no_dist)
        pending, reason = _begin(state_dict, checkpoint_id, process_group, no_dist)
        if pending is not None:
            return metadata_of(pending.result())
    writer = storage_writer or _writer_for(checkpoint_id, use_collectives)
    _say(reason, writer)
    _await_earlier(_path_of(checkpoint_id, writer), by_torch=True)
    return stock.save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=writer,
        planner=planner,
        process_group=process_group,
        no_dist=no_dist,
        **_newer(use_collectives),
    )


def async_save(
    state_dict: Any,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: Any = None,
    planner: Any = None,
    process_group: Any = None,
    async_checkpointer_type: Any = None,
    async_stager: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Any:
    """Begins to save, and returns an AsyncSaveResponse of torch, which is the future of its upload as well.

    Its staging_completion is done when the tensors may change; steps of optimizers wait for that by themselves, as
    `ckpt.fence()` does. Its upload_completion is done when the checkpoint is durable on all ranks, or holds what went wrong on
    any of them.

    Raises:
        ValueError: it is to be done by a process.
        CheckpointError: it could not be begun.
    """
    if getattr(async_checkpointer_type, "value", async_checkpointer_type) not in (None, "thread"):
        raise ValueError(
            "async_save() of ckpt.integrations.dcp does not save by another process (AsyncCheckpointerType.PROCESS): tensors "
            "leave straight from the memory of this one, by threads that do not hold the GIL. Leave async_checkpointer_type out"
        )
    if isinstance(async_stager, LazyStager) and not isinstance(storage_writer, (type(None), LazyStorageWriter)):
        raise ValueError("a LazyStager goes with a LazyStorageWriter: another writer would read tensors while they change")
    reason = _reason_for_torch(checkpoint_id, storage_writer, planner, use_collectives)
    if reason is None and not isinstance(async_stager, (type(None), LazyStager)):
        reason = "async_stager= is one of the caller's"
    if reason is None:
        pending, reason = _begin(state_dict, checkpoint_id, process_group, no_dist)
        if pending is not None:
            upload = UploadFuture(pending)
            in_flight.note(checkpoint_id, False, upload)
            return response(StagingFuture(pending), upload)
    writer = storage_writer or _writer_for(checkpoint_id, use_collectives)
    _say(reason, writer)
    path = _path_of(checkpoint_id, writer)
    _await_earlier(path, by_torch=True)
    more: dict[str, Any] = {
        "checkpoint_id": checkpoint_id,
        "storage_writer": writer,
        "planner": planner,
        "process_group": background_group(process_group, no_dist),
        **({"no_dist": True} if no_dist else {}),
        **_newer(use_collectives),
    }
    found = _as_response(_save_behind(state_dict, writer, async_stager, more))
    if path is not None:
        in_flight.note(path, True, found.upload_completion)
    return found


def load(
    state_dict: Any,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: Any = None,
    planner: Any = None,
    process_group: Any = None,
    no_dist: bool = False,
) -> None:
    """Loads, as torch does, and verifies every byte that it uses. Tensors of saves in flight are captured before.

    Of an id that this process is saving to it waits for that, and loads what is there then.

    Raises:
        CorruptError: something of it is damaged; what was to be loaded may hold parts of it.
        NotACheckpointError: the directory is there, and no checkpoint in it, as when a save did not finish.
    """
    ckpt.fence()
    _await_earlier(_path_of(checkpoint_id, storage_reader), by_torch=True)
    if storage_reader is None and checkpoint_id is not None and _is_path(checkpoint_id):
        storage_reader = VerifyingStorageReader(checkpoint_id)
    more: dict[str, Any] = {"no_dist": True} if no_dist else {}
    try:
        stock.load(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_reader=storage_reader,
            planner=planner,
            process_group=process_group,
            **more,
        )
    except BaseException as error:  # as torch's own is
        if (damage := getattr(storage_reader, "damage", None)) is not None:
            raise damage.with_traceback(None) from error
        for failure in getattr(error, "failures", {}).values():  # of other ranks
            if isinstance(failure[0], CorruptError):
                raise failure[0].with_traceback(None) from error
        raise


# ---- our way, or that of torch ---------------------------------------------------------------------------------------


def _reason_for_torch(checkpoint_id: Any, storage_writer: Any, planner: Any, use_collectives: bool) -> str | None:
    """By the arguments, which are the same on all ranks."""
    if storage_writer is not None:
        return "storage_writer= is given"
    if planner is not None:
        return "planner= is given"
    if not use_collectives:
        return "use_collectives is False"
    if checkpoint_id is None or not _is_path(checkpoint_id):
        return "checkpoint_id is no path of a file system"
    return None


def _is_path(checkpoint_id: Any) -> bool:
    return "://" not in os.fspath(checkpoint_id)


def _begin(state: Any, path: Any, process_group: Any, no_dist: bool) -> tuple[ckpt.PendingSave | None, str | None]:
    """The save; or why torch is to make it."""
    _await_earlier(path, by_torch=False)
    try:
        session = session_of(process_group, no_dist)
    except PeerError:
        raise
    except ckpt.CheckpointError as error:
        return None, str(error)
    try:
        return session.save(path, state), None
    except UnsupportedError as error:
        return None, str(error)


def _path_of(checkpoint_id: Any, place: Any) -> Any:
    """The directory of a writer or reader of torch; None if it has none."""
    if checkpoint_id is None:
        checkpoint_id = getattr(place, "path", None)
    return checkpoint_id if isinstance(checkpoint_id, (str, os.PathLike)) and _is_path(checkpoint_id) else None


def _await_earlier(path: Any, *, by_torch: bool) -> None:
    if path is not None:
        in_flight.await_earlier(path, by_torch, options().commit_timeout_s)


def _writer_for(checkpoint_id: Any, use_collectives: bool) -> Any:
    fits = checkpoint_id is not None and _is_path(checkpoint_id) and use_collectives
    return LazyStorageWriter(checkpoint_id, options()) if fits else None


def _say(reason: str | None, writer: Any) -> None:
    how = ", with LazyStorageWriter" if isinstance(writer, LazyStorageWriter) else ""
    say_once(f"torch.distributed.checkpoint makes this save{how}, because {reason}")


def _save_behind(state: Any, writer: Any, stager: Any, more: dict[str, Any]) -> Any:
    if stager is not None:
        return stock.async_save(state, async_stager=stager, **more)
    if not isinstance(writer, LazyStorageWriter):
        return stock.async_save(state, **more)
    try:
        return stock.async_save(state, async_stager=LazyStager(options()), **more)
    except NotStagedError as error:
        return stock.async_save(state, **torch_private.copying_stager(error.kind), **more)
    except TypeError:  # of a torch that takes no stagers; nothing was begun
        return stock.async_save(state, **more)


def _as_response(found: Any) -> Any:
    if not isinstance(found, concurrent.futures.Future):
        return response(found.staging_completion, found.upload_completion)
    staging: concurrent.futures.Future[None] = concurrent.futures.Future()
    staging.set_result(None)  # all was copied
    return response(staging, found)


def _newer(use_collectives: bool) -> dict[str, Any]:
    """What older torch does not know is left out if it says nothing new."""
    return {} if use_collectives else {"use_collectives": False}


def _warn_if_alone(no_dist: bool) -> None:
    if no_dist or not is_initialized():
        warnings.warn(
            "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to save in a single process.",
            stacklevel=3,
        )
