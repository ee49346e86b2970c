"""save(): plan, submit, and hand over to the background."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ckpt import _native, device_modes
from ckpt import devices as torch_devices
from ckpt._native import SavedStorage
from ckpt.collector import without_collector
from ckpt.devices import HOST
from ckpt.errors import CheckpointError, DeviceError, SkippedError
from ckpt.fence import beginning, unwatch, watch
from ckpt.formats.format import FileFormat
from ckpt.formats.torch_zip import TorchZip
from ckpt.options import AUTO, Options
from ckpt.plan.change_detector import ChangeDetector
from ckpt.plan.lazy_storages import LazyStorages, lazy_storages
from ckpt.plan.save_plan import OWNED, SavePlan, addresses_on_host
from ckpt.plan.shards import find_shards, path_of_shard
from ckpt.plan.unpicklable import explain
from ckpt.saving.background import Publish, SaveFinisher
from ckpt.saving.baselines import Offer
from ckpt.saving.device_sums import DeviceSums
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.runtime import Runtime, orphan
from ckpt.saving.task import SaveTask
from ckpt.sharded.refusals import Refused

logger = logging.getLogger("ckpt")


def start(
    runtime: Runtime,
    finisher: SaveFinisher,
    task: SaveTask,
    contents: Sequence[tuple[FileInFlight, Any, bool]],
    publish: Publish,
    *,
    lazy: Any,
    options: Options,
    ready: Callable[[], None] | None = None,
) -> None:
    """Begins the save of one or more files; on return `task` is on its way, or skipped.

    Args:
        contents: the files, what goes into each, and whether this process writes it: if not, only its structure is noted.
        publish: called on the finisher's thread once the data of all files is durable under their temporary names, or with the
            error; returns what the save's `result()` returns. Not called if this function raises before a file was submitted.
        ready: called when all is planned, and nothing of it is submitted yet; what it raises is raised.

    Raises:
        whatever went wrong; then nothing is left behind, and `task` is not resolved, or will be by the finisher.
    """
    task.planned = tuple(file for file, _, _ in contents)  # also if it is not begun: others may have written to them
    task.planned += tuple(file.apart.file for file, _, _ in contents if file.apart is not None)
    try:
        finisher.admit(task, options)
    except SkippedError as skipped:
        task.skipped = skipped
        task.fail(skipped)
        return
    try:
        with beginning():
            _begin(runtime, task, contents, lazy, options, ready)
    except BaseException as error:
        if task.files:  # those in flight are the finisher's to clean up
            task.begin_error = error
            for file in task.files:
                file.job.fail("another file of the same save could not be begun")
            finisher.commit_later(task, publish)
        else:
            finisher.release()
            _take_back_links(task)
        raise
    finally:
        task.save_s = time.monotonic() - task.started_at
    finisher.commit_later(task, publish)
    _try_out(task, options)
    task.save_s = time.monotonic() - task.started_at


def _begin(
    runtime: Runtime,
    task: SaveTask,
    contents: Sequence[tuple[FileInFlight, Any, bool]],
    lazy: Any,
    options: Options,
    ready: Callable[[], None] | None,
) -> None:
    with without_collector():
        storages = lazy_storages(lazy, _frozen_tensors(file for file, _, _ in contents))
        for file, _, _ in contents:
            if file.apart is not None:
                file.apart.hint = file.hint
        # All of them before the first is submitted: what cannot be pickled is found here.
        plans = [_plan(file, obj, storages if written else None, options) for file, obj, written in contents]
        apart = [file.apart for file, _, _ in contents if file.apart is not None and file.apart.contents is not None]
        contents = [*contents, *((each.file, each.contents, True) for each in apart)]
        plans += [_plan(each.file, each.contents, storages, options) for each in apart]
        for each in apart:
            each.contents = None  # it keeps the tensors
    for (file, obj, _), plan in zip(contents, plans, strict=True):
        if file.replicated and plan.compared is None:
            _refuse_shards(plan.pickle, obj)
    for (file, _, _), plan in zip(contents, plans, strict=True):
        _note_structure(file, plan)
    if ready is not None:
        ready()
    runtime.make_room(sum(plan.device_bytes() for plan in plans))
    for (file, obj, written), plan in zip(contents, plans, strict=True):
        if written:
            _submit_or_copy(runtime, file, obj, plan, storages, options)
            task.files += (file,)
            _start_sums(file, plan)


def _note_structure(file: FileInFlight, plan: SavePlan) -> None:
    """What is compared between ranks when it is published."""
    file.contents = plan.contents
    compared = plan if plan.compared is None else plan.compared
    file.pickle, file.sizes = compared.pickle, compared.sizes
    if file.replicated:
        where = addresses_on_host(compared, copied=file.write_share is not None)
        file.samples = _native.sample_records(addresses=where, sizes=compared.sizes, seed=file.number)


def _refuse_shards(pickled: bytes, obj: Any) -> None:
    if (kind := find_shards(pickled)) is not None:
        path = path_of_shard(obj)
        where = f" (at '{path}')" if path else ""
        raise TypeError(
            f"replicated= holds a {kind}, of which each rank has a part{where}: give it as sharded=, or give what its "
            "full_tensor() returns"
        )


def add_file(runtime: Runtime, task: SaveTask, file: FileInFlight, obj: Any, *, lazy: Any, options: Options) -> None:
    """Begins one more file of a save that has been admitted; the caller hands it over when all are there.

    Raises:
        whatever went wrong with it. Its name is not among the files in flight then.
    """
    began = time.monotonic()
    task.planned += (file,)
    try:
        with beginning():
            with without_collector():
                storages = lazy_storages(lazy, _frozen_tensors([file]))
                plan = _plan(file, obj, storages, options)
            file.pickle, file.sizes = plan.pickle, plan.sizes
            task.device_bytes += plan.device_bytes()
            runtime.make_room(task.device_bytes)
            _submit_or_copy(runtime, file, obj, plan, storages, options)
        task.files += (file,)
        _start_sums(file, plan)
        _try_out(task, options)
    finally:
        task.save_s += time.monotonic() - began


def _plan(file: FileInFlight, obj: Any, lazy: LazyStorages | None, options: Options) -> SavePlan:
    """
    Args:
        lazy: None: only pickle it, for its structure.
    """
    try:
        made = _format_of(file, options)
        return made.structure(obj) if lazy is None else made.plan(obj, lazy, options.size("eager_bytes"), options.device_lazy)
    except (CheckpointError, Refused):
        raise
    except Exception as error:
        explain(error, obj, file.target)
        raise


def _format_of(file: FileInFlight, options: Options) -> FileFormat:
    return file.made or TorchZip(options.record_alignment)


def _submit_or_copy(
    runtime: Runtime, file: FileInFlight, obj: Any, plan: SavePlan, storages: LazyStorages, options: Options
) -> None:
    """If training computes in another context, as a green one, torch copies what lies on devices to the host.

    So it does where the engine cannot use them, and the options leave it the choice. Once a save has begun it does not: what
    that has given to the engine is on its way.
    """
    devices = frozenset(plan.devices) - {HOST}
    reason = runtime.try_open(devices) if devices and options.device_lazy == AUTO else ""
    if not reason:
        try:
            return _submit(runtime, file, obj, plan, options)
        except DeviceError as refused:
            if not refused.in_other_context or not file.devices:
                raise
            reason = str(refused)
    with without_collector():
        plan = _plan(file, obj, storages, dataclasses.replace(options, device_lazy=False))
    _submit(runtime, file, obj, plan, options)
    file.device_mode, file.device_mode_reason = "host", reason


def _submit(runtime: Runtime, file: FileInFlight, obj: Any, plan: SavePlan, options: Options) -> None:
    records = plan.records
    made = _format_of(file, options)
    write_share = file.write_share
    content = made.describe(plan, file.target, file.token)
    file.devices = frozenset(plan.devices) - {HOST}
    file.device_mode, file.device_mode_reason = plan.device_mode, plan.device_mode_reason
    with_proof = bool(file.devices) and device_modes.wants_proof(file.devices, options.device_lazy)
    file.wants_direct = options.direct_io and content.alignment is None  # uniform records lie at no block boundary
    file.offer = Offer() if file.lineage is None else file.lineage.offer()
    frozen = [] if with_proof or options.verify_capture else _mark_frozen(file, records, len(content.head))
    unread = [records[number - len(content.head)].storage for number in frozen]  # what cannot be shared is read at last
    file.hold(
        ChangeDetector(obj if plan.named is None else plan.named, plan.lazy),
        records,
        first_record=len(content.head),
        until_durable=(content, [records[index].storage for index, kind in enumerate(plan.kinds) if kind == OWNED], unread),
        names_to_the_end=options.verify_capture or bool(file.devices or frozen),
        on_sealed=unwatch,
    )
    watch(file, runtime)
    try:
        file.job = runtime.submit(
            path=os.fsencode(file.temporary),
            direct=file.wants_direct,
            archive=content.archive,
            head=content.head,
            addresses=plan.addresses,
            sizes=plan.sizes,
            kinds=bytes(plan.kinds),
            tail=content.tail,
            copy_at_most=options.size("eager_bytes"),
            uniform_alignment=content.alignment or 0,
            verify=options.verify_capture,
            timeout_s=options.timeout_s,
            share_index=write_share.index if write_share else 0,
            share_count=write_share.count if write_share else 1,
            devices=plan.devices,
            streams=torch_devices.streams_of(file.devices),
            expected_limits=file.limits,
            with_directory=file.with_directory,
            like=os.fsencode(file.like),
            directory=-1 if file.directory is None else file.directory.descriptor,
            probe=bool(file.devices),
            sum=with_proof,
            archives=content.archives,
            alike=write_share is None and file.token is not None,
            packed=content.packed,
            numbers=content.numbers,
            baseline=file.offer.baseline,
            reuse=file.offer.wanted,
            share_blocks=file.offer.shares,
            frozen=frozen,
            supposed=[number for number in frozen if file.frozen_marks[number].supposed],
        )
    except BaseException as error:
        unwatch(file)
        if not isinstance(error, Exception):  # interrupted: a writer that hangs may still read what we hold
            orphan(file.memory)
        raise
    file.wants_sums = with_proof
    for name in file.doubted():
        logger.warning("%s was declared frozen, and has changed: it is saved as it is (the save to '%s')", name, file.target)
    if file.lineage is not None and any(mark.supposed for mark in file.doubted_marks()):
        file.lineage.owner.suppose_nothing()  # who writes behind torch's back to one that is frozen may do so to others


def _take_back_links(task: SaveTask) -> None:
    """Files that were linked while the save was planned, which has come to nothing."""
    for file in task.planned:
        if file.apart is not None and file.apart.linked:
            file.apart.file.discard()


def _frozen_tensors(files: Iterable[FileInFlight]) -> list[torch.Tensor]:
    return [tensor for file in files if file.hint is not None for tensor in file.hint.tensors]


def _mark_frozen(file: FileInFlight, records: Sequence[SavedStorage], first_record: int) -> list[int]:
    """Of the records that are declared not to change, notes how they are; returns those of which nothing is known to have
    changed since the checkpoint before, by the core's numbers.
    """
    if file.hint is None or file.lineage is None or not file.offer.wanted:
        return []
    marks = ((number, file.hint.mark_of(record)) for number, record in enumerate(records, first_record))
    trusts = file.lineage.owner.trusts
    file.frozen_marks = {number: mark for number, mark in marks if mark is not None and trusts(mark)}
    if file.offer.baseline is None:
        return []
    before = file.offer.frozen
    return [number for number, mark in file.frozen_marks.items() if mark.key in before and before[mark.key].holds(mark)]


def _start_sums(file: FileInFlight, plan: SavePlan) -> None:
    """Behind submit(), which refuses streams that are being captured: there these would become a part of the graph."""
    if file.wants_sums:
        with contextlib.suppress(RuntimeError):  # torch has no memory for it
            file.device_sums = DeviceSums(plan)


def _try_out(task: SaveTask, options: Options) -> None:
    """The devices of a save that is on its way, whatever comes of this."""
    if options.device_lazy == AUTO:
        device_modes.try_out({device for file in task.files for device in file.devices})


def log_failure(task: SaveTask, error: BaseException | None) -> None:
    if error is None or isinstance(error, SkippedError):
        return
    if "the save " in str(error) and str(task.path) in str(error):  # it says itself of which save it is
        logger.error("%s", error)
    else:
        logger.error("the save to '%s' failed: %s", task.path, error)
