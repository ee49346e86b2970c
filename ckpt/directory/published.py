"""The bundles that a job has published, of which one must be left to go back to."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import remove_bundle
from ckpt.errors import CheckpointError

_MOST_KNOWN = 16  # that are looked for when a save has failed


class PublishedBundles:
    """Of one process."""

    def __init__(self) -> None:
        self._paths: list[Path] = []  # oldest first

    def note(self, path: Path) -> None:
        """It is the newest now."""
        before = [other for other in self._paths if other != path]
        self._paths = [*before[1 - _MOST_KNOWN :], path]

    def check_remaining(self, cause: BaseException | None) -> None:
        """
        Args:
            cause: with which the newest save has failed; None: it has not.

        Raises:
            CheckpointError: it has, and whoever removes old bundles has removed all that were published before.
        """
        if cause is None or not self._paths or any(manifests.read_if_any(path) for path in self._paths):
            return
        gone = ", ".join(f"'{path}'" for path in self._paths)
        self._paths.clear()
        raise CheckpointError(
            f"the newest save failed with: {cause}; and what was published before is gone: {gone}. There is no checkpoint to "
            "go back to: remove an old one only when the next is durable"
        ) from cause

    def remove(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: it is the newest, or something of it is left.
        """
        if path in self._paths[-1:]:
            raise CheckpointError(f"'{path}' is the newest checkpoint that was published, and is not removed")
        if os.path.lexists(path):
            remove_bundle(path)
