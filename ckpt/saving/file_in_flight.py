"""One file of a save on its way: the native job, and the memory that it reads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt._native import SavedStorage
from ckpt.device_modes import Mode
from ckpt.devices import HOST
from ckpt.errors import CaptureError
from ckpt.formats.format import FileFormat
from ckpt.plan.change_detector import ChangeDetector
from ckpt.plan.frozen_marks import FrozenHint, FrozenMark
from ckpt.saving.baselines import Lineage, Offer
from ckpt.saving.device_sums import DeviceSums
from ckpt.storage import durable
from ckpt.storage.temporary_names import shared_path, temporary_path

if TYPE_CHECKING:
    from ckpt.saving.frozen_file import FrozenFile


@dataclasses.dataclass(frozen=True)
class WriteShare:
    """Of a file that all ranks write together. `token` is the same on all of them, and used for no other file."""

    index: int
    count: int
    token: str


class FileInFlight:
    """From submit() to the end of its job. `target` is the name that the file will have, `temporary` the one it has now.

    Args:
        limits: what direct I/O was found to demand there, see Job.limits: then the file is created in the background, which may
            take long where many create files at once. None: submit() creates it, and looks.
        with_directory: make the directory with it, if that is not there.
        replicated: what it holds is said to be the same on several ranks.
        number: of the save, the same on all these ranks: each save takes samples of other bytes.
        made: how it is made of what is saved; None: as torch.save makes files.
        directory: that the file lies in: then it is made there, whatever that is called by then.
        token: of a file that several processes write with the same bytes, each its own; it is the same for all of them.
        like: the file whose permissions it takes over; if not given, what is there under its name, if anything.
    """

    def __init__(
        self,
        target: Path,
        write_share: WriteShare | None = None,
        *,
        limits: tuple[int, int] | None = None,
        with_directory: bool = False,
        replicated: bool = False,
        number: int = 0,
        like: Path | None = None,
        directory: durable.Directory | None = None,
        made: FileFormat | None = None,
        token: str | None = None,
    ) -> None:
        self.target = target
        self.write_share = write_share
        self.limits = limits
        self.with_directory = with_directory
        self.replicated = replicated
        self.number = number
        self.like = like or target
        self.directory = directory
        self.made = made
        self.token = write_share.token if write_share is not None else token
        self.temporary = temporary_path(target) if write_share is None else shared_path(target, write_share.token)
        self.job: Any = None
        self.lineage: Lineage | None = None  # the saves of this file before, if this one may share blocks with them
        self.offer = Offer()  # what it got of that
        self.hint: FrozenHint | None = None  # what the save is told not to change
        self.frozen_marks: dict[int, FrozenMark] = {}  # of what of that it holds, by the core's numbers of the records
        self.apart: FrozenFile | None = None  # the file of its frozen tensors, if these may go to one of their own
        self.wants_direct = False
        self.undecided = False  # a manifest may name the temporary file: it is not ours to remove
        self.given_up = False  # by rank 0, if it is shared: nobody will publish it
        self.pickle = b""  # the structure of what is saved, and the sizes of its records: to be compared between ranks
        self.sizes: Sequence[int] = ()
        self.samples = b""  # a checksum of some bytes of each record, if it is replicated
        self.contents: Any = None  # as its format notes them
        self.devices: frozenset[int] = frozenset()  # from which bytes are fetched
        self.device_mode: Mode | None = None  # how they leave, see ckpt/device_modes.py
        self.device_mode_reason = ""
        self.wants_sums = False
        self.device_sums: DeviceSums | None = None
        self.was_proof = False  # all bytes of devices were compared
        self.changed_device = HOST  # whose bytes were found to be others in the file
        self.first_record = 0  # the core's number of the record data/0
        self._lock = threading.Lock()  # guards what follows
        self._sealed = False
        self._until_captured: Any = None  # keeps the tensors' memory
        self._until_durable: Any = None  # keeps the memory that is ours
        self._change_detector: ChangeDetector | None = None
        self._records: Sequence[SavedStorage] | None = None  # for their names
        self._names_to_the_end = False
        self._on_sealed: Callable[[FileInFlight], None] | None = None
        self._seal_error: CaptureError | None = None

    def hold(
        self,
        change_detector: ChangeDetector,
        records: Sequence[SavedStorage],
        *,
        first_record: int,
        until_durable: Any,
        names_to_the_end: bool,
        on_sealed: Callable[[FileInFlight], None],
    ) -> None:
        """Keeps the memory; to be called before the job can read it.

        Args:
            first_record: the core's number of the first of `records`.
            names_to_the_end: a change may be found after the fence, and must be named then.
        """
        self._change_detector, self._records, self.first_record = change_detector, records, first_record
        self._names_to_the_end, self._on_sealed = names_to_the_end, on_sealed
        self._until_captured, self._until_durable = records, until_durable

    @property
    def memory(self) -> Any:
        """What a writer may still be reading."""
        return self._until_captured, self._until_durable

    def try_seal(self, ordered: bool = False) -> bool:
        """If the job is captured: looks once whether a tensor was changed before, and lets go of the memory.

        Args:
            ordered: the streams on which training computes wait for the copies. Else those from a device must have ended.
        """
        job = self.job
        if job is None or not job.captured:
            return False
        with self._lock:
            if self._sealed:
                return True
            if self.devices and not (ordered or job.released or job.error is not None):
                return False
            if (error := job.error) is not None:
                # Writes from the memory may still be under way; nothing will be published, so it may change, but not go.
                if not job.finished:
                    return True
                if isinstance(error, CaptureError) and error.record >= 0:
                    self._seal_error = self._error_of(error.record)
            elif name := self._find_changed():
                # Kept here, because the job may have finished its file already; it is not published before this look.
                self._seal_error = self._capture_error(name)
                job.fail(str(self._seal_error))
            if not self.devices or job.released:  # else copies from a device are only ordered, see free()
                self._until_captured = None
            if not self._names_to_the_end:
                self._change_detector = self._records = None
            self._sealed = True
        if self._on_sealed is not None:
            self._on_sealed(self)
        return True

    def _find_changed(self) -> str | None:
        """The name of what was written to; None if nothing tells of a write."""
        if self._change_detector is None:
            return None
        name = self._change_detector.changed()
        if name is None and (record := self.job.find_changed()) is not None:
            name = self._name_of(record)
        return name

    def _name_of(self, record: int) -> str:
        if self._change_detector is None or self._records is None:
            return "a tensor"
        return self._change_detector.describe(self._records[record - self.first_record].tensor)

    def _capture_error(self, name: str) -> CaptureError:
        return CaptureError(
            f"{name} was changed before its bytes were captured by the save to '{self.target}'; nothing was published. Call "
            "ckpt.fence() before code that writes to tensors outside an optimizer step, or save them with lazy=False"
        )

    def free(self) -> None:
        """When the job is released: nothing reads the tensors' memory any more."""
        with self._lock:
            if self._sealed:
                self._until_captured = None

    def compare_sums(self) -> None:
        """When the job has ended well: whether the bytes of devices in the file are those that the devices have summed up."""
        sums, self.device_sums = self.device_sums, None
        if sums is None or self.job.error is not None:
            return
        found = sums.find_changed(self.job.word_sums[self.first_record :])
        self.was_proof = sums.complete
        if found is not None:
            index, self.changed_device = found
            self._seal_error = self._device_error(self._name_of(index + self.first_record), self.changed_device)

    def error(self) -> BaseException | None:
        """What has ended the job, with the tensor's name where the core only knows a record's number."""
        error: BaseException | None = self._seal_error or self.job.error
        if isinstance(error, CaptureError) and error.record >= 0:  # found behind the fence
            return self._error_of(error.record)
        return error

    def doubted(self) -> list[str]:
        """The names of tensors that were declared not to change, and did: they are saved as they are."""
        return [self._name_of(record) for record in self.job.doubted if not self.frozen_marks[record].supposed]

    def doubted_marks(self) -> list[FrozenMark]:
        """Of them, and of those that were only supposed not to change."""
        return [self.frozen_marks[record] for record in self.job.doubted]

    def stat(self, name: str) -> Any:
        """What its job says of itself; None if it was not begun."""
        return None if self.job is None else self.job.stats[name]

    def _frozen_error(self, record: int) -> CaptureError:
        name, since = self._name_of(record), self.offer.read_step
        older = "older checkpoints" if since is None else f"the checkpoints after step {since}"
        mark = self.frozen_marks.get(record)
        supposed = mark is not None and mark.supposed
        believed = "requires no gradient, was taken for frozen," if supposed else "was declared frozen,"
        remedy = "write to it by operations of torch (not through .data or numpy)"
        return CaptureError(
            f"{name} {believed} and has changed in a way that torch does not tell of; nothing was published of the save to "
            f"'{self.target}', and {older} may hold an older value of it. From now on all that was taken for frozen is read in "
            "each save; " + (remedy if supposed else f"take out of frozen= what changes, or {remedy}")
        )

    def _error_of(self, record: int) -> CaptureError:
        if self.job.stats["frozen_changed"]:
            return self._frozen_error(record)
        name, device = self._name_of(record), self.job.stats["changed_device"]
        if device == HOST:
            return self._capture_error(name)
        self.changed_device = device
        return self._device_error(name, device)

    def _device_error(self, name: str, device: int) -> CaptureError:
        return CaptureError(
            f"{name}, on CUDA device {device}, is not in the file of the save to '{self.target}' as it was inside save(); "
            "nothing was published. Either something wrote to it that no fence held back (call ckpt.fence() before what writes "
            "outside an optimizer step, on each stream that does, and before each replay of a graph), or the device does not "
            "keep the order of its streams (see ckpt.check_devices())"
        )

    def let_go(self) -> None:
        """At the end of the job."""
        self._until_durable = self._change_detector = self._records = None

    def reach(self, path: Path) -> Path:
        """`path`, a name beside the file, wherever its directory is by now."""
        return path if self.directory is None else self.directory.reach / path.name

    def close_directory(self) -> None:
        if self.directory is not None:
            self.directory.close()

    def found_limits(self) -> tuple[int, int] | None:
        """For the next file there. None if this one was not created here."""
        return None if self.job is None else self.job.limits

    @property
    def reused_bytes(self) -> int:
        """That this process has not written: they are in blocks that the file shares with that of the save before."""
        return int(self.stat("reused_bytes") or 0)

    def shared(self) -> dict[str, Any]:
        """These, and the step of that save, as a manifest has them; nothing where saves have no steps."""
        reused, step = self.reused_bytes, self.offer.step
        return {} if step is None or not reused else {"shared_bytes": reused, "shared_step": step}

    def drop_baseline(self) -> None:
        """Of a file that is not published: nothing may be taken from it."""
        if self.job is not None:
            self.job.drop_baseline()

    def forget_structure(self) -> None:
        self.pickle, self.sizes, self.samples, self.contents = b"", (), b"", None

    def discard(self) -> None:
        """Removes the file that will not be published. One that is shared may be published by rank 0, until that gives it up.

        Then every rank removes it: one that comes late may have made it anew.
        """
        self.drop_baseline()
        if not self.undecided and (self.write_share is None or self.write_share.index == 0 or self.given_up):
            durable.remove_quietly(self.reach(self.temporary))
