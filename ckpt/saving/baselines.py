"""What a committed save leaves for the next one: of each file what was in it, piece by piece, and the file itself, held open.

Only what a checkpoint names gets here: a save that failed, or of which it is not known, leaves nothing.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ckpt.options import Options
from ckpt.plan.frozen_marks import FrozenHint, FrozenMark

if TYPE_CHECKING:
    from ckpt.saving.file_in_flight import FileInFlight


@dataclasses.dataclass(frozen=True)
class Offer:
    """What one save of a file may use of the one before.

    Attributes:
        wanted: it is compared, piece by piece, and the next one may use it.
        baseline: of the file before; None: there is none.
        shares: blocks with that; False: all is written.
        age: how many saves in a row have shared blocks, each with the one before; that one counted.
        step: of the checkpoint before, if it has one.
        frozen: what was declared not to change when that was saved, by storage.
        read_step: of the newest checkpoint of which all was read.
    """

    wanted: bool = False
    baseline: Any = None
    shares: bool = False
    age: int = 0
    step: int | None = None
    frozen: Mapping[int, FrozenMark] = dataclasses.field(default_factory=dict)
    read_step: int | None = None


class Baselines:
    """Of one session. For the thread that saves, and the one that ends saves."""

    def __init__(self, options: Options) -> None:
        self._wanted = options.reuse
        self._refresh_every = options.refresh_every
        self._lock = threading.RLock()  # guards what follows; a handler of a signal may save, too
        self._number = -1  # of the save that has left these
        self._left: dict[str, Offer] = {}
        self._refused: set[str] = set()  # directories whose file system shares no blocks
        # Memory that was declared not to change, and has changed; by keys, which no others get as long as the marks are here.
        self._distrusted: dict[int, FrozenMark] = {}
        self._supposes = True  # that what nobody has declared may be frozen all the same

    def follow(self, file: FileInFlight, root: object, role: str, hint: FrozenHint | None = None) -> None:
        """
        Args:
            root: the directory in which its checkpoint lies.
            role: the same in each save: by that the file before is found.
            hint: what the save is told not to change.
        """
        file.hint = hint
        if self._wanted:
            file.lineage = Lineage(self, str(root), role)

    def offer(self, lineage: Lineage) -> Offer:
        """For a save that begins now."""
        with self._lock:
            if lineage.root in self._refused:
                return Offer()
            found = self._left.get(lineage.key, Offer(wanted=True))
            due = self._refresh_every and found.age + 1 >= self._refresh_every
            return dataclasses.replace(found, shares=found.baseline is not None and not due)

    def note_committed(self, number: int, step: int | None, files: Iterable[FileInFlight]) -> None:
        """Takes what the files of a checkpoint leave; what was left before goes, unless it is of a later save."""
        left: dict[str, Offer] = {}
        refused = set()
        for file in files:
            if file.lineage is None:
                continue
            if file.job.stats["reuse_refused"]:
                refused.add(file.lineage.root)
            baseline = file.job.take_baseline()
            if baseline is not None:
                age = file.offer.age + 1 if file.reused_bytes else 0
                frozen = {mark.key: mark for mark in file.frozen_marks.values()}
                read_step = file.offer.read_step if file.job.stats["unread_bytes"] else step
                left[file.lineage.key] = Offer(True, baseline, True, age, step, frozen, read_step)
        with self._lock:
            self._refused |= refused
            if number > self._number and self._wanted:
                self._number, self._left, left = number, left, self._left
        _let_go(left)

    def note_failed(self, files: Iterable[FileInFlight]) -> None:
        """Where one of them has found a change, nothing that was declared to be frozen is believed again; and of a file with
        which blocks could not be shared that were not to be read, nothing is taken any more.
        """
        for file in files:
            if file.stat("frozen_changed"):
                with self._lock:
                    self._distrusted |= {mark.key: mark for mark in file.frozen_marks.values()}
                    self._supposes = False
            if file.stat("unread_refused"):
                self.give_up()

    def suppose_nothing(self) -> None:
        """From now on only what is declared is believed to be frozen."""
        with self._lock:
            self._supposes = False

    def trusts(self, mark: FrozenMark) -> bool:
        """For a save that begins now."""
        with self._lock:
            if mark.supposed and not self._supposes:
                return False
            return mark.key not in self._distrusted

    def give_up(self) -> None:
        """Lets go of all files: what of them has been removed takes room on the disk until then."""
        with self._lock:
            left, self._left = self._left, {}
        _let_go(left)

    def clear(self) -> None:
        """The same, for good."""
        with self._lock:
            self._wanted = False
        self.give_up()


def _let_go(left: Mapping[str, Offer]) -> None:
    """Saves that are on their way keep what they need; nobody else does, whatever he keeps of saves that have ended."""
    for offer in left.values():
        if offer.baseline is not None:
            offer.baseline.let_go()


@dataclasses.dataclass(frozen=True)
class Lineage:
    """The same file in one save after the other."""

    owner: Baselines
    root: str
    role: str

    @property
    def key(self) -> str:
        return f"{self.root}/{self.role}"

    def offer(self) -> Offer:
        return self.owner.offer(self)
