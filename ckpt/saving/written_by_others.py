"""What a bundle holds that others write: files that are there already, and saves of other sessions that are on their way."""

from __future__ import annotations

from pathlib import Path

from ckpt.errors import DeadlineError
from ckpt.saving.pending import PendingSave
from ckpt.storage import durable


class WrittenByOthers:
    """Of one bundle, on one rank."""

    def __init__(self) -> None:
        self._included: list[Path] = []
        self._followed: list[PendingSave] = []

    def include(self, path: Path) -> None:
        """A file or a directory, which lies there when the bundle is published."""
        self._included.append(path)

    def follow(self, pending: PendingSave) -> None:
        self._followed.append(pending)

    def make_durable(self, timeout_s: float) -> BaseException | None:
        """Waits for all of it; the error that keeps the bundle from being published, if there is one.

        Args:
            timeout_s: longest wait for one save, seconds.
        """
        errors = []
        try:
            for pending in self._followed:
                errors.append(pending.exception(timeout_s))  # for all of them: then nobody writes there any more
            for path in self._included:
                durable.sync_tree(path)
        except (OSError, DeadlineError) as error:
            return error
        return next((error for error in errors if error is not None), None)
