"""Who writes what several ranks hold: one of them, so that all have about as much to write.

Each rank comes to the same answer without a word: it looks only at what its own group of ranks holds, and all in a group hold
the same. So the work does not grow with the number of ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ckpt.sharded.meshes import Group


def find_owned(items: Iterable[tuple[Group, int]]) -> set[int]:
    """The numbers of the items that this rank writes.

    Args:
        items: the same ones, in the same order, for all ranks of a group: those who hold the item, and its bytes.
    """
    owned: set[int] = set()
    shared: dict[bytes, tuple[Group, list[tuple[int, int]]]] = {}
    for number, (group, nbytes) in enumerate(items):
        if group.size == 1:
            owned.add(number)
        else:
            shared.setdefault(group.key, (group, []))[1].append((-nbytes, number))
    for group, heaviest_last in shared.values():
        owned.update(_share_out(group, sorted(heaviest_last)))
    return owned


def _share_out(group: Group, items: list[tuple[int, int]]) -> list[int]:
    """The heaviest first, each to the rank that has least so far."""
    loads = [(0, index) for index in range(min(group.size, len(items)))]  # in order: it is a heap
    mine = []
    for negative, number in items:
        load, index = loads[0]
        if index == group.place:
            mine.append(number)
        heapq.heapreplace(loads, (load - negative, index))
    return mine
