"""The files of frozen tensors that committed saves leave for the next ones, which give them one more name, and write nothing.

Only what a checkpoint names gets here, and only files of this process: they are held open. As long as the frozen tensors are
the same memory, that nobody has written to as far as can be told, the next save links the file into its own directory. Every
`Options.refresh_every`-th save writes it anew, and compares.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt.options import Options
from ckpt.plan.frozen_marks import FrozenMark
from ckpt.storage.linking import HeldFile

if TYPE_CHECKING:
    from ckpt.saving.frozen_file import FrozenFile


class Frozen(NamedTuple):
    """One tensor in such a file. Keeps no memory.

    Attributes:
        number: of its record, in the save that has written it.
        note: of its storage.
        path: that leads to it.
        form: what must be the same for it to be used again.
    """

    number: int
    note: FrozenMark
    path: tuple[Any, ...]
    form: tuple[Any, ...]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


class Left(NamedTuple):
    """What a committed save has left.

    Attributes:
        held: the file.
        crc32: of it.
        tensors: all that is in it, in its order.
        samples: a checksum of some bytes of each.
        token: of the file; see FrozenTensors.
        crc32s: of the tensors.
        archives: of a file of several: see Job.
        checksums: of such a file, those of its pieces.
        age: how many saves in a row have taken this file from the one before.
        step: of the newest of them, if it has one.
    """

    held: HeldFile
    crc32: int
    tensors: Sequence[Frozen]
    samples: Sequence[bytes]
    token: str
    crc32s: Sequence[int]
    archives: list[tuple[int, int]]
    checksums: bytes
    age: int
    step: int | None


class FrozenFiles:
    """Of one session. For the thread that saves, and the one that ends saves."""

    def __init__(self, options: Options) -> None:
        self._wanted = options.frozen == "separate"
        self._always_anew = options.verify_capture  # then nothing is believed that can be looked at
        self._refresh_every = options.refresh_every
        self._lock = threading.RLock()  # guards what follows; a handler of a signal may save, too
        self._number = -1  # of the save that has left these
        self._left: Mapping[str, Left] = {}
        self._distrusted: dict[int, FrozenMark] = {}  # by keys of storages, which no others get as long as the notes are here

    def is_for(self, declared: Any) -> bool:
        """Whether what a save is told not to change may go to a file of its own."""
        return self._wanted and declared is not None

    def offer(self, key: str) -> tuple[Left | None, bool]:
        """For a save that begins now: what the one before has left, and whether that may be linked rather than written anew."""
        with self._lock:
            found = self._left.get(key)
            due = found is None or (self._refresh_every and found.age + 1 >= self._refresh_every)
            return found, not due and not self._always_anew

    def note_committed(self, number: int, step: int | None, files: Iterable[FrozenFile]) -> None:
        """Takes what a checkpoint leaves, unless that of a later one is here."""
        left = {file.key: file.leave(step) for file in files}
        with self._lock:
            if number > self._number and self._wanted:
                self._number, self._left = number, {key: each for key, each in left.items() if each is not None}

    def distrust(self, notes: Iterable[FrozenMark]) -> None:
        """Something has written to this memory that nothing has told of: from now on it is saved with all else."""
        with self._lock:
            self._distrusted |= {note.key: note for note in notes}

    def trusts(self, note: FrozenMark) -> bool:
        with self._lock:
            return note.key not in self._distrusted

    def give_up(self) -> None:
        """Lets go of all files: what of them has been removed takes room on the disk until then."""
        with self._lock:
            self._left = {}

    def clear(self) -> None:
        """The same, for good."""
        with self._lock:
            self._wanted = False
        self.give_up()
