"""load_into(): the bytes of a file straight into tensors that are there."""

from __future__ import annotations

import bisect
import os
from pathlib import Path
from typing import Any

import torch

from ckpt._archive import TIMEOUT_S, Archive, allocate
from ckpt._fit import Fit, Pair
from ckpt._load import is_zip, open_archive
from ckpt._outline import Outline
from ckpt._runtime import fence
from ckpt.errors import CheckpointError, MismatchError

_TEMPORARY_BYTES = 64 << 20  # of several small tensors that are read together; a larger one is read alone
_SHOWN_PROBLEMS = 20


def load_into(
    path: str | os.PathLike[str],
    target: Any,
    strict: bool = True,
    *,
    weights_only: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Loads a file written by save() or by `torch.save` into tensors that exist: no second copy of the state is made.

    Everything is compared before a byte is written. Then records are read straight into the memory of CPU tensors that are laid
    out as in the file; for each other tensor (strided otherwise, on a device, a part of a record) through a temporary of its
    size. Saves in flight are fenced first. Version counters move, as for any change in place.

    Args:
        path: the file.
        target: what load() would return, with memory already: nested dicts, lists and tuples of tensors, modules and
            optimizers. A module stands for its state_dict(), an optimizer for its own; an optimizer that has not stepped yet
            takes the state from the file. Numbers, texts and other plain values are replaced where their container allows it.
        strict: keys that only one side has are an error; False passes over them.
        weights_only: as in `torch.load`.
        timeout_s: longest that reading may take, seconds.

    Raises:
        MismatchError: the two do not fit; lists all keys, dtypes and shapes that differ. Nothing has been written.
        CorruptError, StorageError, DeadlineError: as from load(). If that is found while reading, the target holds parts of the
            file: load another one into it.
        CheckpointError: the file holds objects that weights_only refuses, or is in torch's format of before 1.6.
    """
    archive = _open(Path(os.fspath(path)), timeout_s)
    outline = Outline(archive, weights_only)
    fit = Fit(outline, strict)
    fit.lay(outline.value, target)
    if fit.problems:
        raise _mismatch(archive, fit.problems)
    fence()
    _fill(archive, outline, fit)
    for put in fit.last:
        put()


def _mismatch(archive: Archive, problems: list[str]) -> MismatchError:
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    if len(problems) > _SHOWN_PROBLEMS:
        shown += f"; and {len(problems) - _SHOWN_PROBLEMS} more"
    text = f"'{archive.path}' does not fit what it is to be loaded into: {shown}. Nothing was changed"
    return MismatchError(text, problems)


def _open(path: Path, timeout_s: float) -> Archive:
    """For what goes by records.

    Raises:
        CheckpointError: this file has none.
    """
    if not is_zip(path):
        raise CheckpointError(f"'{path}' is in torch's format of before 1.6: use load()")
    archive = open_archive(path, timeout_s)
    if archive.byte_order() not in (None, "little"):
        raise CheckpointError(f"'{path}' is from a machine of another byte order: use load()")
    return archive


def _fill(archive: Archive, outline: Outline, fit: Fit) -> None:
    by_record: dict[str, list[Pair]] = {}
    for pair in fit.pairs:
        if pair.source.numel():
            by_record.setdefault(pair.record, []).append(pair)
    direct: dict[str, Any] = {name: outline.storages[name] for name in fit.adopted}
    taken = _Intervals()
    for name, pairs in by_record.items():
        first = pairs[0]
        if name not in direct and _takes_whole(first, archive.records[name].size) and taken.add(first.target):
            direct[name] = first.target
    archive.fill(direct)
    with torch.no_grad():
        for name in by_record.keys() & direct.keys():
            _copy_to_others(by_record[name], direct[name])
        _fill_the_rest(archive, {name: pairs for name, pairs in by_record.items() if name not in direct})
    for pair in fit.pairs:
        if not pair.target.is_inference():
            torch.autograd.graph.increment_version(pair.target)


def _takes_whole(pair: Pair, nbytes: int) -> bool:
    """Whether the record's bytes, as they are, are those of the target."""
    source, target = pair.source, pair.target
    span = sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True)) + 1
    return (
        target.device.type == "cpu"
        and source.stride() == target.stride()
        and source.storage_offset() == 0
        and source.numel() == span  # dense: no gaps, nothing twice
        and source.nbytes == nbytes
    )


class _Intervals:
    """Memory that threads write to: no byte twice."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, tensor: torch.Tensor) -> bool:
        """False if it overlaps with what was added."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = bisect.bisect_right(self._begins, begin)
        if (at and self._ends[at - 1] > begin) or (at < len(self._begins) and self._begins[at] < end):
            return False
        self._begins.insert(at, begin)
        self._ends.insert(at, end)
        return True


def _copy_to_others(pairs: list[Pair], filled: torch.Tensor | torch.UntypedStorage) -> None:
    """What shares the record with a tensor that has got it: from there, unless it shares memory here too."""
    for pair in pairs:
        source = _view(pair.source, filled)
        here = (source.data_ptr(), source.stride()) == (pair.target.data_ptr(), pair.target.stride())
        if not (here and source.device == pair.target.device):
            pair.target.copy_(source)


def _fill_the_rest(archive: Archive, by_record: dict[str, list[Pair]]) -> None:
    batch: dict[str, torch.UntypedStorage] = {}
    held = 0
    for name in by_record:
        record = archive.records[name]
        if batch and held + record.size > _TEMPORARY_BYTES:
            _fill_batch(archive, by_record, batch)
            batch, held = {}, 0
        batch[name] = allocate(record.size, record.offset)
        held += record.size
    _fill_batch(archive, by_record, batch)


def _fill_batch(archive: Archive, by_record: dict[str, list[Pair]], batch: dict[str, torch.UntypedStorage]) -> None:
    archive.fill(batch)
    for name, storage in batch.items():
        for pair in by_record[name]:
            pair.target.copy_(_view(pair.source, storage))


def _view(source: torch.Tensor, filled: torch.Tensor | torch.UntypedStorage) -> torch.Tensor:
    """The tensor that `source` is in the outline, over memory that holds the record."""
    whole, rest = 0, 0
    if isinstance(filled, torch.Tensor):
        whole, rest = divmod(int(filled.storage_offset()) * filled.itemsize, source.itemsize)
    if rest:  # a record of several dtypes, filled into a tensor that stands askew for this one
        assert isinstance(filled, torch.Tensor)
        filled, whole = filled.clone(memory_format=torch.preserve_format), 0
    storage = filled.untyped_storage() if isinstance(filled, torch.Tensor) else filled
    return torch.empty(0, dtype=source.dtype).set_(storage, whole + source.storage_offset(), source.shape, source.stride())
