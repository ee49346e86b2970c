"""The commit of an inbox: its files come into the step directory, and the manifest makes them a checkpoint.

    1. plan.json: the name of each file there          an inbox
    2. the mark, if the step directory is new          an inbox; the directory is a leftover, see unpublished.py
    3. each file gets its second name there            the same
    4. fsync the step directory                        the same
    5. publish(): manifest and `latest`                a checkpoint
    6. retention at home, and the inbox goes           a checkpoint

An end between any two leaves what the next attempt takes up. A job that cleans the directory meanwhile removes what it takes
for leftovers: where there are hard links, the inbox still has all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
from pathlib import Path

from ckpt import _native
from ckpt.directory import manifest as manifests
from ckpt.directory import sharded_files, unpublished
from ckpt.directory.in_flight import FilesInFlight
from ckpt.directory.keeping import Keeping
from ckpt.directory.listing import LATEST, newest_after
from ckpt.directory.manifest import NAMED_BY_OTHERS, FileEntry, Manifest
from ckpt.directory.publishing import publish
from ckpt.directory.retention import Retention
from ckpt.directory.root import Root, has_size
from ckpt.directory.step_names import free_name, is_step_name, names_in, names_in_manifest, stem_of, step_name
from ckpt.drain.copying import part_path
from ckpt.errors import CheckpointError, CorruptError, StorageError
from ckpt.storage import durable, temporary_names

logger = logging.getLogger("ckpt")

PLAN = "plan.json"
# Other files name these: they cannot get another name.


class MissingError(CheckpointError):
    """A file that was delivered is gone.

    Attributes:
        name: as in the inbox.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"'{name}' is gone")
        self.name = name


@dataclasses.dataclass
class _Plan:
    """
    Attributes:
        token: names the mark in the step directory.
        names: at home, by the name on the node.
        replaced: what the step's manifest has named until now.
        others: for Manifest.others.
    """

    token: str
    names: dict[str, str]
    replaced: list[str]
    others: list[str]
    marked: bool


def is_placed(source: Path, target: Path, entry: FileEntry) -> bool:
    """Whether a file of an inbox lies in its place already: there are no links here, and an earlier attempt has come so far.

    Raises:
        MissingError: it is in neither.
    """
    if os.path.lexists(source):
        if not has_size(source, entry.bytes):
            raise MissingError(entry.name)
        return False
    if has_size(target, entry.bytes) and _native.digest_file(os.fsencode(target), 1) == (entry.bytes, entry.crc32):
        return True
    raise MissingError(entry.name)


class Arrival:
    """One commit. Its caller has the lock.

    Args:
        shared: files that lie in the inbox under <name>.part, because all nodes have written to them.
        keeping: which committed steps stay at home.
    """

    def __init__(self, home: Path, inbox: Path, manifest: Manifest, shared: set[str], keeping: Keeping) -> None:
        self._home = home
        self._inbox = inbox
        self._manifest = manifest
        self._shared = shared
        self._directory = home / step_name(manifest.step)
        self._root = Root(home)
        self._in_flight = FilesInFlight()
        self._retention = Retention(
            home, self._in_flight, keeping, shared=True, max_in_flight=1, note_lost=_ignore, warn_once=_warn
        )

    def publish(self) -> None:
        """Steps 1 to 5.

        Raises:
            MissingError: a file is neither in the inbox nor in the step directory.
            CheckpointError: a file needs a name that is taken.
            StorageError: a system call failed.
        """
        if manifests.is_at(self._directory, self._manifest.sequence):
            self.finish()
            return
        plan = self._read_plan() or self._make_plan()
        durable.make_directory(self._directory, durable=True)
        if plan.marked:
            durable.make_empty_file(unpublished.mark_of(self._directory, plan.token))
        for entry in self._manifest.files:
            self._place(entry, plan)
            durable.crash_point("drain-placed")
        durable.sync_directory(self._directory)
        durable.crash_point("drain-all-placed")
        self._retention.note_replaced(self._directory, plan.replaced)
        newest = newest_after(self._home, self._manifest.sequence) is None
        try:
            publish(self._root, self._directory, self._at_home(plan), plan.token, self._retention.note_replaced, newest=newest)
        except CorruptError as error:  # somebody has cleaned the step directory: the inbox still has all
            raise StorageError(errno.EAGAIN, str(error), str(self._directory)) from error

    def finish(self) -> None:
        """What follows the rename of the manifest, if there was an end just behind it."""
        plan = self._read_plan()
        if plan is not None:
            self._retention.note_replaced(self._directory, plan.replaced)
        durable.sync_directory(self._directory)
        if newest_after(self._home, self._manifest.sequence) is None:
            self._root.point_latest(f"{self._directory.name}\n")

    def tidy(self) -> None:
        """Step 6 without the inbox. The checkpoint is durable already: a failure here is only logged."""
        try:
            there = manifests.read(self._directory)
            sharded_files.mend(self._directory, there)
            for left in (self._home / LATEST, self._directory / unpublished.UNMARKED):
                durable.remove_stale(left)
            self._leave_alone_what_others_write()
            self._retention.tidy(self._directory, there, None)
            while self._retention.retired:
                self._retention.sweep_one()
        except (CheckpointError, OSError) as error:
            logger.warning("tidying '%s' failed, the checkpoint is good: %s", self._home, error)

    # ---- names -----------------------------------------------------------------------------------------------------

    def _read_plan(self) -> _Plan | None:
        try:
            return _Plan(**json.loads((self._inbox / PLAN).read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(errno.EIO, f"cannot read '{self._inbox / PLAN}': {error}", str(self._inbox)) from error

    def _make_plan(self) -> _Plan:
        there, before = names_in(self._directory), manifests.read_if_any(self._directory)
        if sharded_files.metadata_name(self._manifest) is not None and sharded_files.foreign_metadata(there, before):
            raise CheckpointError(f"'{self._directory}' holds a {sharded_files.METADATA} that is not of this checkpoint")
        taken = there | names_in_manifest(self._directory)
        names: dict[str, str] = {}
        for entry in self._manifest.files:
            names[entry.name] = self._free_name(entry, taken | set(names.values()))
        strangers = before is None and unpublished.may_hold_others(there)
        others = sorted(unpublished.finished(there)) if strangers else [] if before is None else [*before.others]
        plan = _Plan(
            token=temporary_names.shared_token(0),
            names=names,
            replaced=[] if before is None else sorted(sharded_files.names_of(before)),
            others=others,
            marked=before is None and not strangers,
        )
        self._write_plan(plan)
        return plan

    def _write_plan(self, plan: _Plan) -> None:
        durable.replace_durably(self._inbox / PLAN, json.dumps(dataclasses.asdict(plan)).encode(), "drain-plan")

    def _free_name(self, entry: FileEntry, taken: set[str]) -> str:
        if entry.name not in taken:
            return entry.name
        stem = stem_of(entry.name)
        if stem is None or entry.kind in NAMED_BY_OTHERS:
            raise CheckpointError(f"'{self._directory / entry.name}' is there already, and this file can get no other name")
        return free_name(stem, taken)

    def _at_home(self, plan: _Plan) -> Manifest:
        files = tuple(
            dataclasses.replace(entry, name=plan.names[entry.name], temporary="", shared_bytes=0, shared_step=0)
            for entry in self._manifest.files
        )
        return dataclasses.replace(self._manifest, files=files, others=tuple(plan.others))

    # ---- files -----------------------------------------------------------------------------------------------------

    def _place(self, entry: FileEntry, plan: _Plan) -> None:
        source = self._inbox / entry.name
        if entry.name in self._shared and not os.path.lexists(source):
            source = part_path(source)
        if is_placed(source, self._directory / plan.names[entry.name], entry):
            return
        try:
            durable.link_or_rename(source, self._directory / plan.names[entry.name])
        except StorageError as error:
            if error.errno != errno.EEXIST:
                raise
            taken = names_in(self._directory) | names_in_manifest(self._directory) | set(plan.names.values())
            plan.names[entry.name] = self._free_name(entry, taken)
            self._write_plan(plan)
            durable.link_or_rename(source, self._directory / plan.names[entry.name])

    def _leave_alone_what_others_write(self) -> None:
        """Step directories where a job is just saving files of its own: it may be this run's trainer, or another node's."""
        for name in names_in(self._home):
            if is_step_name(name) and name != self._directory.name:
                with contextlib.suppress(StorageError):
                    written = {each for each in names_in(self._home / name) if temporary_names.is_temporary(each)}
                    if written:
                        self._in_flight.add(name, written)


def _warn(key: str, text: str, *details: object) -> None:
    logger.warning(text, *details)


def _ignore(path: Path) -> None:
    """A directory without a manifest is told of by the job that saves here."""
