"""Keeps this process from removing a step directory that one of its saves is writing into."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator


class FilesInFlight:
    """May be used by all threads.

    Attributes:
        being_removed: names of step directories.
        changed: guards what is in flight, and what its owner lets it guard besides. Who holds it may call all methods.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()  # over a lock that is reentrant
        self._files: dict[str, set[str]] = {}  # by the name of the step directory
        self.being_removed: set[str] = set()

    def wait_until_it_stays(self, directory: str) -> None:
        """Until nobody takes this step directory away."""
        with self.changed:
            self.changed.wait_for(lambda: directory not in self.being_removed)

    def files_of(self, directory: str) -> set[str]:
        with self.changed:
            return set(self._files.get(directory, ()))

    def add(self, directory: str, files: Iterable[str]) -> None:
        with self.changed:
            self._files.setdefault(directory, set()).update(files)

    def discard(self, directory: str, files: Iterable[str]) -> bool:
        """Whether these were the last of the step directory."""
        with self.changed:
            left = self.files_of(directory).difference(files)
            if left:
                self._files[directory] = left
                return False
            self._files.pop(directory, None)
            self.changed.notify_all()
            return True

    def __bool__(self) -> bool:
        """Whether anything is being written or taken away."""
        with self.changed:
            return bool(self._files or self.being_removed)

    @contextlib.contextmanager
    def taking_away(self, directory: str) -> Iterator[bool]:
        """Meanwhile no save begins in this step directory. False if one is under way there: then it must stay."""
        with self.changed:
            free = directory not in self._files
            if free:
                self.being_removed.add(directory)
        try:
            yield free
        finally:
            if free:
                with self.changed:
                    self.being_removed.discard(directory)
                    self.changed.notify_all()
