"""The file of frozen tensors that goes with a file of a save: written, or that of the save before under one more name."""

from __future__ import annotations

import logging
import secrets
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ckpt import _native, torch_private
from ckpt import devices as torch_devices
from ckpt._native import SavedStorage
from ckpt.directory.frozen_files import FrozenReference
from ckpt.errors import CaptureError, CheckpointError, CorruptError, StorageError
from ckpt.formats.frozen_apart import FrozenTensors
from ckpt.formats.tensors_file import TensorsFile
from ckpt.loading.skeleton import is_plain_tensor
from ckpt.plan.frozen_marks import FrozenHint, FrozenMark, version_of
from ckpt.plan.tensor_paths import find_paths
from ckpt.saving.baselines import Offer
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.frozen_files import Frozen, FrozenFiles, Left
from ckpt.saving.linked_job import LinkedJob
from ckpt.saving.piece_sums import checksums_of
from ckpt.sharded.contents import Item
from ckpt.sharded.planning import Candidate
from ckpt.storage import durable
from ckpt.storage.linking import HeldFile

logger = logging.getLogger("ckpt")

LEAST_RECORD_BYTES = 1 << 20
LEAST_BYTES = 64 << 20  # of all together: below that a file of its own is not worth it
_SEED = 0x5EED  # of samples: the same in each save, so that they can be compared


class FrozenFile:
    """Of one save. What it is to hold is known once the state has been planned.

    Args:
        file: it.
        key: the same in each save: by that the file before is found.

    Attributes:
        hint: what the save was told not to change.
        contents: what is to be written to it, until that has been planned; None: nothing, it is linked, or there is none.
        items: of a sharded state, what is in it, in the order of its archives.
        is_there: whether there is one at all.
        linked: whether it is that of the save before.
    """

    def __init__(self, file: FileInFlight, files: FrozenFiles, key: str) -> None:
        self.file = file
        self.key = key
        self.contents: Any = None
        self.items: Sequence[Item] = ()
        self.is_there = self.linked = False
        self._files = files
        self.hint: FrozenHint | None = None
        self._left: Left | None = None
        self._tensors: Sequence[Frozen] = ()
        self._records: Sequence[SavedStorage] = ()  # of these, while it is being planned
        self._samples: Sequence[bytes] = ()
        self._checksums = b""
        self._crc32s: Sequence[int] = ()
        self._token = ""
        self._chosen = False
        self._held: HeldFile | None = None

    # ---- inside save() -----------------------------------------------------------------------------------------------

    def choose(self, records: Sequence[SavedStorage], obj: Any) -> FrozenReference | None:
        """Finds out which records of a state go to it, and whether it is to be written; links it otherwise.

        None: there is none. See formats/frozen_apart.py. May be called again for the same save.
        """

        def name(numbers: Sequence[int], known: Iterable[Any]) -> list[Any]:
            keys = {torch_private.key_of(records[number].storage): number for number in numbers}
            paths = {keys[key]: path for key, path in find_paths(obj, keys.keys(), known).items()}
            return [paths.get(number, (f"storage {number}",)) for number in numbers]

        self._take(records, name)
        if not self.is_there:
            return None
        if not self.linked and self._records:
            self.contents = {each.name: _tensor_of(record) for each, record in zip(self._tensors, self._records, strict=True)}
            if len(self.contents) != len(self._tensors):
                raise CheckpointError(f"two tensors of the save to '{self.file.target.parent}' have the same path in its state")
            self.file.made = FrozenTensors(token=self._token)
        numbers = {each.number: place for place, each in enumerate(self._tensors)}
        return FrozenReference(self.file.target.name, FrozenTensors(token=self._token).identity, numbers)

    def choose_archives(self, candidates: Sequence[Candidate]) -> list[int]:
        """The same for the parts of a sharded state: see ShardedPlanner.plan()."""
        names = [(each.name,) for each in candidates]
        self._take([each.record for each in candidates], lambda numbers, _: [names[number] for number in numbers])
        if self.is_there and not self.linked and self._records:
            self.contents = [(record.tensor, False) for record in self._records]
            self.file.made = TensorsFile()
        self.items = [candidates[each.number].item for each in self._tensors]
        return [each.number for each in self._tensors]

    def _take(self, records: Sequence[SavedStorage], name: Callable[[Sequence[int], Iterable[Any]], list[Any]]) -> None:
        """
        Args:
            name: gives paths of records by their numbers; is told those that the save before has found.
        """
        self._records = []
        if self._chosen:  # the same state is planned once more, as where a device cannot be used
            if any(torch_private.key_of(records[each.number].storage) != each.note.key for each in self._tensors):
                raise CheckpointError(f"the state has changed while the save to '{self.file.target.parent}' was being begun")
            return
        self._chosen = True
        self._left, usable = self._files.offer(self.key)
        notes = {number: note for number, record in enumerate(records) if (note := self._note_of(record)) is not None}
        for number in self._find_touched(records, notes):
            del notes[number]
        if sum(records[number].nbytes for number in notes) < LEAST_BYTES:
            return
        paths = name([*notes], () if self._left is None else [each.path for each in self._left.tensors])
        chosen = [records[number] for number in notes]
        self._tensors = [
            Frozen(number, note, path, (path, *_look(record)))
            for (number, note), record, path in zip(notes.items(), chosen, paths, strict=True)
        ]
        self.is_there, self._samples = True, [_sample(record) for record in chosen]
        self.linked = usable and self._left is not None and self._fits(self._left) and self._link(self._left)
        if not self.linked:
            self._token, self._records = secrets.token_hex(), chosen

    def _find_touched(self, records: Sequence[SavedStorage], notes: Mapping[int, FrozenMark]) -> list[int]:
        """The numbers of those that samples show to have been written to, though nothing else tells of it.

        They are never trusted again.
        """
        if self._left is None:
            return []
        pairs = zip(self._left.tensors, self._left.samples, strict=True)
        before = {each.note.key: (each, sample) for each, sample in pairs}
        known = {number: before.get(note.key) for number, note in notes.items()}
        same = {number: found for number, found in known.items() if found is not None and found[0].note.holds(notes[number])}
        touched = [number for number, (_, was) in same.items() if was != _sample(records[number])]
        for number in touched:
            self._files.distrust([notes[number]])
            logger.warning(
                "%s has been written to, though frozen= says that it does not change, and in a way that nothing tells of (as "
                "through .data, or numpy); it is read in each save from now on: leave it out of frozen=",
                same[number][0].name,
            )
        return touched

    def _note_of(self, record: SavedStorage) -> FrozenMark | None:
        if record.nbytes < LEAST_RECORD_BYTES or record.low != 0 or record.nbytes != record.storage.nbytes():
            return None
        note = None if self.hint is None else self.hint.mark_of(record)
        return note if note is not None and not note.supposed and self._files.trusts(note) else None

    def _fits(self, left: Left) -> bool:
        """Whether the file has just what is to be saved, as far as can be told without reading it."""
        pairs = [*zip(left.tensors, self._tensors, strict=False)]
        return (
            len(left.tensors) == len(self._tensors)
            and all(before.form == now.form and before.note.holds(now.note) for before, now in pairs)
            and left.samples == self._samples
        )

    def _link(self, left: Left) -> bool:
        if left.held.link(self.file.temporary):
            return False
        durable.crash_point("frozen-linked")
        self._held, self._token = left.held, left.token
        self.file.job = LinkedJob(left.held.size, left.crc32, left.archives, left.checksums)
        self.file.offer = Offer(step=left.step)
        return True

    @property
    def linked_bytes(self) -> int:
        """That are not written."""
        return self.file.job.size if self.linked else 0

    # ---- in the background -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """When all files are durable under their temporary names: whether this is what it was taken for.

        Raises:
            CorruptError: somebody has written to the file that was linked.
            CaptureError: a tensor has changed that was said not to, in a way that nothing tells of.
        """
        if not self.is_there:
            return
        if self.linked:
            if self._held is None or not self._held.is_as_it_was() or not self._held.is_at(self.file.temporary):
                self._files.give_up()
                raise CorruptError(
                    f"'{self.file.target}' was to be the file of frozen tensors of the save before, and somebody has written "
                    "to that meanwhile: nothing was published, and the next save writes it anew"
                )
            return
        try:
            self._held = HeldFile(self.file.temporary, self.file.job.size)
        except StorageError:  # then the next save writes it, too
            self._held = None
        if self._held is not None:
            archives = self.file.job.archives
            self._crc32s = crc32s_in(self._held, len(self._tensors), archives)
            self._checksums = checksums_of(self.file) if archives else b""
            if self._left is not None:
                self._compare(self._left)

    def _compare(self, before: Left) -> None:
        """What is taken for unchanged must have the checksums that it had."""
        known = {each.form: (each.note, crc) for each, crc in zip(before.tensors, before.crc32s, strict=True)}
        changed = []
        for each, crc in zip(self._tensors, self._crc32s, strict=True):
            note, was = known.get(each.form, (None, crc))
            if note is not None and note.holds(each.note) and was != crc:
                changed.append(each)
        if not changed:
            return
        self._files.distrust(each.note for each in changed)
        self._files.give_up()
        names = ", ".join(each.name for each in changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise CaptureError(
            f"{names} in the save to '{self.file.target.parent}' changed, though frozen= says that it does not, and nothing "
            f"told of it (as of a write through .data, or numpy): the {before.age + 1} checkpoints before may have its old "
            "values. Nothing was published. From now on it is read in each save; leave it out of frozen="
        )

    def leave(self, step: int | None) -> Left | None:
        """What the next save may use, once a checkpoint names it."""
        if self._held is None or not self.is_there:
            return None
        job, before = self.file.job, self._left
        if self.linked and before is not None:
            return before._replace(tensors=self._tensors, age=before.age + 1, step=step)
        made = (self._held, job.crc32, self._tensors, self._samples, self._token, self._crc32s)
        return Left(*made, list(job.archives), self._checksums, 0, step)


def _look(record: SavedStorage) -> tuple[Any, ...]:
    """What of it must be the same in the file. The tensor that is saved may have a counter of its own."""
    tensor = record.tensor
    if tensor is None:
        return record.nbytes, str(record.location)
    form = tuple(tensor.shape), tensor.stride(), str(tensor.dtype), tensor.storage_offset()
    return record.nbytes, str(record.location), *form, version_of(tensor)


def _tensor_of(record: SavedStorage) -> torch.Tensor:
    """All of its storage: the tensor that covers it, if that is a plain one, else its bytes."""
    tensor = None if record.tensor is None else record.tensor.detach()
    if tensor is not None and is_plain_tensor(tensor) and tensor.is_contiguous() and tensor.nbytes == record.nbytes:
        return tensor
    return torch.empty(0, dtype=torch.uint8, device=record.storage.device).set_(record.storage, 0, (record.nbytes,), (1,))


def _sample(record: SavedStorage) -> bytes:
    """A checksum of a few bytes of it, always the same ones; of devices there is none, since that would wait for them."""
    if torch_devices.in_use.in_host_memory or record.location != "cpu":
        return b""
    return _native.sample_records(addresses=[record.storage.data_ptr()], sizes=[record.nbytes], seed=_SEED)


def crc32s_in(held: HeldFile, count: int, archives: Sequence[tuple[int, int]]) -> list[int]:
    """Of its tensors, as its directories say.

    Args:
        count: of tensors.
        archives: of a file of several, offset and length of each: with one tensor each.
    """
    if archives:
        return [_crc32s_of(held, at, length)[0] for at, length in archives]
    found = _crc32s_of(held, 0, held.size)
    return [found[number] for number in range(count)]


def _crc32s_of(held: HeldFile, at: int, length: int) -> dict[int, int]:
    """By the numbers of the records."""
    with zipfile.ZipFile(held.part(at, length)) as archive:
        entries = ((entry.filename.partition("/")[2], entry.CRC) for entry in archive.infolist())
        return {int(name.removeprefix("data/")): crc for name, crc in entries if name.startswith("data/")}


def settle(files: Iterable[FileInFlight], error: BaseException | None) -> BaseException | None:
    """Looks once more at the files of frozen tensors of a save, when all is durable; returns what is wrong with it.

    Args:
        error: what was wrong before.
    """
    try:
        for file in files:
            if file.apart is not None and error is None:
                file.apart.settle()
    except Exception as caught:
        return caught.with_traceback(None)
    return error
