"""Where one rank finds the files of a checkpoint: on its node, at home, or both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ckpt.directory import manifest as manifests


class StepPlaces:
    """
    Args:
        directories: of the step, nearest first; the first one has the manifest.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self.nearest = directories[0]
        self._directories = directories

    def __str__(self) -> str:
        return str(self.nearest)

    def path_of(self, name: str) -> Path:
        """The nearest that has a file of this name. If none has: where it should be, so that errors name that."""
        found = (directory / name for directory in self._directories if os.path.lexists(directory / name))
        return next(found, self.nearest / name)

    def hold(self, sequence: int) -> bool:
        """Whether that commit still lies there; files that are gone from one place may be in another."""
        return any(manifests.is_at(directory, sequence) for directory in self._directories)
