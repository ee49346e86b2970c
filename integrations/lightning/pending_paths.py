"""What Lightning has asked for and disk does not show yet: saves in flight, and the removals and links that wait for them.

Lightning saves, links and removes by name, and takes each to be done when the call returns. Here a save is under way for a
while, and has no name until it is durable. So each removal, and each link, waits for the newest save that was begun before it:

* If that becomes durable, the removal is made, and the link.
* If it fails, neither is: what was to be removed stands in for what was to take its place. It goes when that place is taken
  after all, or is given up: when the same path is saved again, or is itself removed, and the save behind that is durable.

All in one process: global rank 0 saves, removes and links.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from ckpt import names
from ckpt.errors import CheckpointError, DeadlineError

logger = logging.getLogger("ckpt")


class Pending(Protocol):
    """A save on its way, as ckpt.PendingSave."""

    def add_done_callback(self, callback: Callable[[Any], object]) -> None: ...

    def exception(self, timeout: float | None = None) -> BaseException | None: ...


class _Save:
    """
    Attributes:
        error: why it failed; None until then.
        is_given_up: its path was removed since.
        settled: it has ended, and what waited for it has been done, or waits for another one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.error: BaseException | None = None
        self.ended = self.is_given_up = False
        self.settled = threading.Event()

    @property
    def is_durable(self) -> bool:
        return self.ended and self.error is None


class PendingPaths:
    """Paths are absolute, of the local file system.

    Args:
        note: is told of each save that has ended, with its error, before anything is done behind it.
        timeout_s: longest that wait() waits, seconds.
    """

    def __init__(self, note: Callable[[Any, BaseException | None], object], timeout_s: float) -> None:
        self._note = note
        self._timeout_s = timeout_s
        self._guard = threading.RLock()  # for all below
        self._saves: list[_Save] = []  # that are not settled, in the order in which they were begun
        self._newest: _Save | None = None
        self._failed: dict[str, _Save] = {}  # by path: of those that were not saved again, or removed, since
        self._removals: dict[str, _Save] = {}  # what is to be removed, and behind which save
        self._links: dict[str, tuple[str, _Save]] = {}  # what is to lead where, and behind which save

    # ---- what Lightning asks for -----------------------------------------------------------------------------------

    def begin(self, path: str, make: Callable[[], Pending]) -> Pending:
        """Begins a save by `make`. What it replaces need not be removed any more.

        Raises:
            what `make` raises; then nothing is changed.
        """
        save, pending = _Save(path), make()
        with self._guard:
            self._removals.pop(path, None)
            self._links.pop(path, None)
            for failed in [each for each in self._failed.values() if each.path == path or each.is_given_up]:
                self._hand_on(failed, save)
            self._saves.append(save)
            self._newest = save
        pending.add_done_callback(lambda done: self._end(save, done))
        return pending

    def remove(self, path: str) -> None:
        """Behind the newest save: at once if that is durable."""
        with self._guard:
            self._links.pop(path, None)
            newest = self._newest
            if newest is not None and newest.ended and newest.path == path:
                newest.is_given_up, newest = True, None
            elif newest is not None and (failed := self._failed.get(path)) is not None:
                self._hand_on(failed, newest)
            gone: list[str] = []
            if newest is None or newest.is_durable:
                self._removals.pop(path, None)
                gone = [path] if newest is None else [path, *self._take_removals(newest)]
            else:
                self._removals[path] = newest
            retired = [self._retire(each) for each in gone]
        _remove(retired)

    def link(self, path: str, target: str) -> None:
        """Lets `path` lead to `target` when that is durable.

        Raises:
            StorageError: it is, and the link cannot be made.
        """
        with self._guard:
            self._removals.pop(path, None)
            self._links.pop(path, None)
            save = self._under_way(target)
            if save is not None:
                self._links[path] = target, save
            elif target in self._failed:
                logger.warning("'%s' stays as it is: the save to '%s' failed", path, target)
            else:
                names.replace_link(Path(path), Path(target))

    def exists(self, path: str) -> bool:
        """Whether it would be there if all that was asked for were done."""
        with self._guard:
            is_there = path in self._links or self._under_way(path) is not None or os.path.exists(path)
            return is_there and path not in self._removals

    def failure_of(self, path: str) -> BaseException | None:
        """Why the newest save to `path` failed; what lies there is older."""
        with self._guard:
            failed = self._failed.get(path)
            return None if failed is None or failed.is_given_up else failed.error

    def wait(self) -> None:
        """Until nothing is under way, whatever becomes of it.

        Raises:
            DeadlineError: it takes longer than timeout_s.
        """
        with self._guard:
            saves = list(self._saves)
        for save in saves:
            if not save.settled.wait(self._timeout_s):
                raise DeadlineError(f"the save to '{save.path}' is still in flight after {self._timeout_s:g} s")

    # ---- behind a save, on a thread of the library -----------------------------------------------------------------

    def _end(self, save: _Save, pending: Pending) -> None:
        retired: list[Path | None] = []
        try:
            error = pending.exception()
            self._note(pending, error)
            with self._guard:
                save.ended, save.error = True, error
                links = [path for path, (_, behind) in self._links.items() if behind is save]
                for path in links:
                    self._link_now(path, *self._links.pop(path))
                gone = self._take_removals(save) if error is None else self._keep(save)
                retired = [self._retire(path) for path in gone]
            _remove(retired)
        finally:
            with self._guard:
                self._saves.remove(save)
            save.settled.set()

    def _under_way(self, path: str) -> _Save | None:
        return next((each for each in reversed(self._saves) if each.path == path and not each.ended), None)

    def _take_removals(self, save: _Save) -> list[str]:
        """Those that wait for nothing any more. What is being saved itself is removed behind that.

        Args:
            save: one that is durable.
        """
        gone: list[str] = []
        while (path := next((each for each, behind in self._removals.items() if behind is save), None)) is not None:
            del self._removals[path]
            if (under_way := self._under_way(path)) is not None:
                self._removals[path] = under_way
                continue
            gone.append(path)
            if (failed := self._failed.get(path)) is not None:
                self._hand_on(failed, save)
        return gone

    def _keep(self, failed: _Save) -> list[str]:
        """What stands in for it stays, unless it was given up and its place is taken: those that wait for nothing any more."""
        failed.is_given_up = self._removals.get(failed.path) is failed
        if failed.is_given_up:
            del self._removals[failed.path]
        self._failed[failed.path] = failed
        newest = self._newest
        if failed.is_given_up and newest is not None and newest is not failed:
            self._hand_on(failed, newest)
            return self._take_removals(newest) if newest.is_durable else []
        kept = [path for path, behind in self._removals.items() if behind is failed]
        if kept:
            logger.warning("%s stays: the save to '%s' failed", ", ".join(map(repr, kept)), failed.path)
        return []

    def _hand_on(self, failed: _Save, save: _Save) -> None:
        """What stood in for one that failed now waits for another."""
        del self._failed[failed.path]
        for path, behind in self._removals.items():
            if behind is failed:
                self._removals[path] = save

    def _link_now(self, path: str, target: str, behind: _Save) -> None:
        if behind.error is not None:
            logger.warning("'%s' stays as it is: the save to '%s' failed", path, target)
            return
        try:
            names.replace_link(Path(path), Path(target))
        except CheckpointError as error:
            logger.error("%s", error)

    def _retire(self, path: str) -> Path | None:
        """Takes its name at once: half of it never looks whole, and a save may take the name. What is to be removed."""
        try:
            return names.retire(Path(path))
        except CheckpointError as error:
            logger.error("'%s' is left over, and cannot be removed: %s", path, error)
            return None


def _remove(retired: Iterable[Path | None]) -> None:
    for path in retired:
        if path is not None:
            try:
                names.remove(path)
            except (CheckpointError, OSError) as error:
                logger.error("'%s' is left over, and cannot be removed: %s", path, error)
