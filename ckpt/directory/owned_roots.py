"""The directories of bundles that a job has claimed. A framework may take a new one for each checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ckpt.directory.bundles import BundleRoot

_MOST_ROOTS = 4  # directories that stay locked


class OwnedRoots:
    """Of one process that leads."""

    def __init__(self) -> None:
        self._roots: dict[Path, BundleRoot] = {}  # oldest first
        self._moved: list[BundleRoot] = []  # claimed by names that lead elsewhere by now

    def claim(self, root: Path, busy: Collection[Path], kept: Path | None, *, below: bool = True) -> BundleRoot:
        """The directory, which is ours now; others are given back, if there are many.

        Args:
            busy: what is being saved, below directories that are needed.
            kept: one more that is.
            below: see BundleRoot.claim().

        Raises:
            InUseError, StorageError: as BundleRoot.claim().
        """
        own = self._roots.pop(root, None)
        if own is not None and not own.is_at(root):  # renamed, and another one made: what is in flight there still needs it
            self._moved.append(own)
            own = None
        own = own or BundleRoot.claim(root, below=below)
        self._roots[root] = own
        if not busy:
            self._release_moved()
        idle = [
            path for path in self._roots if path not in (root, kept) and not any(each.is_relative_to(path) for each in busy)
        ]
        for path in idle[: max(0, len(self._roots) - _MOST_ROOTS)]:
            self._roots.pop(path).release()
        return own

    def release(self) -> None:
        """Safe to call again."""
        while self._roots:
            self._roots.popitem()[1].release()
        self._release_moved()

    def _release_moved(self) -> None:
        while self._moved:
            self._moved.pop().release()
