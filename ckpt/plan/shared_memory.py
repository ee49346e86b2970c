"""Memory that other processes see. They may write to it at any time, and no fence of this process holds them up.

Torch says of its own storages whether they are shared. Of memory that it got from elsewhere (numpy, another library, a slice of
a storage) it knows nothing; the kernel does.
"""

from __future__ import annotations

import bisect

_MAPPINGS = "/proc/self/maps"
_SHARED = ord("s")  # the fourth of the letters that tell what may be done with a mapping; else it is "p"


def shared_mappings() -> list[tuple[int, int]]:
    """The addresses [begin, end) of each shared mapping of this process, ascending.

    Raises:
        OSError: the kernel does not tell.
    """
    found = []
    with open(_MAPPINGS, "rb") as lines:
        for line in lines:  # b"7f5d66d71000-7f5d66d72000 rw-s 00000000 00:1b 116114   /dev/shm/..."
            addresses, _, rest = line.partition(b" ")
            if rest[3] == _SHARED:
                begin, _, end = addresses.partition(b"-")
                found.append((int(begin, 16), int(end, 16)))
    return found


class SharedMemory:
    """As it is when it is first asked: that takes some tenths of a millisecond, for each look at it."""

    def __init__(self) -> None:
        self._mappings: list[tuple[int, int]] | None = None

    def has(self, begin: int, end: int) -> bool:
        """Whether any of the addresses [begin, end) lies in it. Where the kernel does not tell, it may."""
        if self._mappings is None:
            try:
                self._mappings = shared_mappings()
            except OSError:
                self._mappings = [(0, 1 << 64)]
        last = bisect.bisect_left(self._mappings, (end,)) - 1  # the last that begins before the end
        return last >= 0 and self._mappings[last][1] > begin
