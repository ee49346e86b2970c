"""What the drains of all nodes do at home: they deliver into an inbox, and whoever finds it complete commits it.

    .run                       names the run whose home this is
    .drain/publish.lock        held by who opens an inbox, commits, or removes something
    .drain/<run>/<sequence>/   an inbox: what is on its way
        inbox.json                 its manifest, as it is on the nodes, and its token
        rank-00000.pt  ...         under <name>.part until they are whole; what all nodes write together, until the commit
        failure-node-0001.json     why this node delivers no more, see others.py
        receipt-node-0000.json     what this node has delivered, and found to be right
        plan.json                  the names that the files get in their step directory, once somebody commits

An inbox that was removed and made again has another token: what was noted of the one before holds no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory import publish_lock
from ckpt.directory.listing import newest_after
from ckpt.directory.manifest import Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.directory.publish_lock import FOLDER, RUN
from ckpt.directory.run_file import find_run, write_run
from ckpt.directory.step_names import name_at_home, names_in
from ckpt.drain import others
from ckpt.drain.arrival import Arrival, MissingError
from ckpt.drain.bundle_arrival import BundleArrival
from ckpt.drain.node import Generation, Node
from ckpt.drain.others import Failure
from ckpt.drain.parts import Delivered, expect_whole, is_shared, owners_of
from ckpt.errors import CheckpointError, StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import is_temporary

logger = logging.getLogger("ckpt")

_INBOX = "inbox.json"


class OutdoneError(CheckpointError):
    """A later commit has taken the place of this one at home.

    Attributes:
        by: its sequence.
    """

    def __init__(self, by: int) -> None:
        super().__init__(f"a later commit, {by}, is at home already")
        self.by = by


@dataclasses.dataclass(frozen=True)
class _Inbox:
    token: str
    manifest: Manifest


class Home:
    def __init__(self, node: Node) -> None:
        self._node = node
        self.path = node.home
        self.inboxes = node.home / FOLDER / node.run

    def expect_ours(self) -> None:
        """
        Raises:
            StorageError: it is not there: it may come back.
            CheckpointError: it is the home of another run.
        """
        run = find_run(self.path)
        if run is None:
            path = self.path / RUN
            text = f"there is no '{path}': is the file system mounted? If it was removed, --rebuild makes it anew"
            raise StorageError(errno.ENOENT, text, str(path))
        if run != self._node.run:
            raise CheckpointError(
                f"'{self.path}' is the home of the run {run}, and this node has saved the run {self._node.run}"
            )

    def rebuild(self) -> None:
        """Makes it the home of this run again, if it was lost.

        Raises:
            CheckpointError: it is the home of another run.
            StorageError: it cannot be written to.
        """
        durable.make_directory(self.path, durable=True)
        write_run(self.path, self._node.run)
        self.expect_ours()

    # ---- delivering ------------------------------------------------------------------------------------------------

    def inbox_of(self, sequence: int) -> Path:
        return self.inboxes / f"{sequence:012d}"

    def opened(self) -> list[int]:
        """What some node has begun to deliver: sequences, newest first."""
        return sorted((int(name) for name in names_in(self.inboxes) if name.isdecimal()), reverse=True)

    def open_inbox(self, generation: Generation, wanted: bool) -> str:
        """Makes the inbox if there is none; returns its token.

        Args:
            wanted: also if something newer is there.

        Raises:
            OutdoneError: something newer is there, or something newer of the same step.
            CheckpointError: other nodes deliver something else under this number.
            StorageError, InUseError: it cannot be made now.
        """
        inbox = self.inbox_of(generation.sequence)
        durable.make_directory(self.path / FOLDER, durable=True)
        with self._publishing():
            self._refuse_outdone(generation.manifest, inbox)
            newer = None if wanted else newest_after(self.path, generation.sequence)
            if newer is not None:
                raise OutdoneError(newer.sequence)
            found = self._read_inbox(inbox)
            if found is None:
                durable.make_directory(inbox, durable=True)
                document = {"format": manifests.FORMAT, "token": secrets.token_hex(8), "manifest": generation.content.decode()}
                durable.replace_durably(inbox / _INBOX, manifests.with_checksum(document), "drain-inbox")
                return str(document["token"])
        if found.manifest != generation.manifest:
            raise CheckpointError(f"'{inbox}' is for another checkpoint of the same number; remove it if no node writes to it")
        return found.token

    def _refuse_outdone(self, manifest: Manifest, inbox: Path) -> None:
        there = manifests.read_if_any(self._step(manifest))
        if there is not None and there.sequence > manifest.sequence:
            if os.path.lexists(inbox):
                self._discard(inbox)  # nobody is going to commit it
            raise OutdoneError(there.sequence)

    def _step(self, manifest: Manifest) -> Path:
        return self.path / name_at_home(manifest)

    def _read_inbox(self, inbox: Path) -> _Inbox | None:
        try:
            said = manifests.parse_checked((inbox / _INBOX).read_bytes())
            return _Inbox(str(said["token"]), manifests.parse(said["manifest"].encode()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(error.errno or 0, f"cannot read '{inbox / _INBOX}': {error.strerror}", str(inbox)) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"'{inbox / _INBOX}' cannot be understood: {error!r}") from error

    def manifest_of(self, sequence: int) -> Manifest | None:
        """Of what is being delivered."""
        found = self._read_inbox(self.inbox_of(sequence))
        return None if found is None else found.manifest

    def write_receipt(self, sequence: int, token: str, node: int, parts: Sequence[Delivered]) -> None:
        """This node has delivered all that it has to. The names in the inbox are made durable first.

        Args:
            node: its number in the save that has made the generation, as everywhere here.
        """
        inbox = self.inbox_of(sequence)
        durable.sync_directory(inbox)
        document = {
            "format": manifests.FORMAT,
            "node": node,
            "token": token,
            "files": [part._asdict() for part in parts],
        }
        durable.replace_durably(self._receipt(inbox, node), manifests.with_checksum(document), "drain-receipt")

    def has_receipt(self, sequence: int, node: int) -> bool:
        inbox = self.inbox_of(sequence)
        found = self._read_inbox(inbox)
        return found is not None and self._read_receipt(inbox, node, found.token) is not None

    def _receipt(self, inbox: Path, node: int) -> Path:
        return inbox / f"receipt-node-{node:04d}.json"

    def _read_receipt(self, inbox: Path, node: int, token: str) -> list[Delivered] | None:
        path = self._receipt(inbox, node)
        try:
            said = manifests.parse_checked(path.read_bytes())
            if said["token"] != token or said["node"] != node:
                return None
            return [Delivered(str(each["name"]), *(int(each[key]) for key in Delivered._fields[1:])) for each in said["files"]]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
        except (ValueError, KeyError, TypeError, RecursionError):
            return None  # its node writes it anew

    # ---- nodes that do not deliver ---------------------------------------------------------------------------------

    def missing(self, sequence: int, place: NodePlace) -> list[int]:
        """The numbers of the nodes that have not delivered; none, if nothing is being delivered."""
        inbox = self.inbox_of(sequence)
        found = self._read_inbox(inbox)
        nodes = range(0 if found is None else place.count)
        return [node for node in nodes if found is not None and self._read_receipt(inbox, node, found.token) is None]

    def note_failure(self, sequence: int, node: int, failure: Failure) -> None:
        """Tells other nodes that this one has given up, if they look for what it has to deliver.

        Raises:
            StorageError: home cannot be written to.
        """
        if self._read_inbox(self.inbox_of(sequence)) is not None:
            others.write_failure(self.inbox_of(sequence), node, failure)

    # ---- committing ------------------------------------------------------------------------------------------------

    def is_committed(self, name: str, sequence: int) -> bool:
        """
        Args:
            name: of the directory.
        """
        return manifests.is_at(self.path / name, sequence)

    def newest_instead(self, name: str, sequence: int, *, is_step: bool) -> int:
        """The commit that is there in place of this one, which may be itself; -1 if none is.

        Args:
            name: of the directory.
            is_step: then anything newer is; for a bundle only what has the same name.

        Raises:
            CheckpointError: home is not there, or cannot be read.
        """
        self.expect_ours()
        there = manifests.read_if_any(self.path / name)
        if there is not None and there.sequence >= sequence:
            return there.sequence
        newer = newest_after(self.path, sequence) if is_step else None
        return -1 if newer is None else newer.sequence

    def commit(self, sequence: int, place: NodePlace, wants: Callable[[Manifest], bool]) -> bool:
        """Makes a checkpoint of an inbox to which all nodes have delivered. False: one has not.

        Args:
            place: of this node in the save that has made it.
            wants: whether an older generation is to come home all the same: says which inboxes stay.

        Raises:
            OutdoneError: something newer of the same step is there.
            CorruptError: what was delivered is not what the manifest says.
            StorageError, InUseError: it cannot be done now.
        """
        inbox = self.inbox_of(sequence)
        if self._delivered(inbox, place.count) is None:
            return False
        with self._publishing() as locked:
            if not locked and place.number != 0:
                return False  # without locks one node must do it
            found, delivered = self._read_inbox(inbox), self._delivered(inbox, place.count)  # again: now nobody changes it
            if found is None or delivered is None:
                return False
            self._refuse_outdone(found.manifest, inbox)
            by_node = dict(enumerate(delivered))
            expect_whole(found.manifest.files, (part for parts in delivered for part in parts))
            shared = {entry.name for entry in found.manifest.files if is_shared(entry, place.count)}
            arrival = self._arrival(inbox, found.manifest, shared)
            try:
                arrival.publish()
            except MissingError as error:  # their owners bring it again
                for node in owners_of(error.name, by_node):
                    durable.remove_file(self._receipt(inbox, node))
                return False
            durable.crash_point("drain-published")
            arrival.tidy()
            self._discard(inbox)
            self._discard_older(found.manifest, wants)
        return True

    def _arrival(self, inbox: Path, manifest: Manifest, shared: set[str]) -> Arrival | BundleArrival:
        if manifest.bundle:
            return BundleArrival(self.path, inbox, manifest)
        return Arrival(self.path, inbox, manifest, shared, self._node.home_keeping)

    def finish(self, name: str, sequence: int) -> None:
        """What an end behind the publication has left to be done."""
        inbox = self.inbox_of(sequence)
        if not os.path.lexists(inbox) and not any(map(is_temporary, names_in(self.inboxes))):
            return
        with self._publishing():
            self._sweep()
            found = self._read_inbox(inbox)
            if found is not None and self.is_committed(name, sequence):
                arrival = self._arrival(inbox, found.manifest, set())
                arrival.finish()
                arrival.tidy()
            if self.is_committed(name, sequence) and os.path.lexists(inbox):
                self._discard(inbox)

    def _delivered(self, inbox: Path, nodes: int) -> list[list[Delivered]] | None:
        """What each node has; None if one has not ended."""
        found = self._read_inbox(inbox)
        if found is None:
            return None
        receipts = []
        for node in range(nodes):
            receipt = self._read_receipt(inbox, node, found.token)
            if receipt is None:
                return None
            receipts.append(receipt)
        return receipts

    def _discard(self, inbox: Path) -> None:
        """At once, under its name; what cannot be removed is tried again later."""
        try:
            durable.retire_directory(inbox)
            durable.crash_point("drain-discarded")
        except OSError as error:
            logger.warning("removing '%s' failed, the checkpoint is good: %s", inbox, error)
        self._sweep()

    def _sweep(self) -> None:
        """Inboxes that are none any more. Its caller has the lock."""
        try:
            for name in names_in(self.inboxes):
                if is_temporary(name):
                    durable.remove_tree(self.inboxes / name)
        except OSError as error:
            logger.warning("removing what was delivered to '%s' failed, the checkpoint is good: %s", self.inboxes, error)

    def _discard_older(self, manifest: Manifest, wants: Callable[[Manifest], bool]) -> None:
        """
        Args:
            manifest: of what was just committed.
        """
        for older in self.opened():
            if older < manifest.sequence:
                with contextlib.suppress(CheckpointError):
                    found = self._read_inbox(self.inbox_of(older))
                    replaced = found is not None and self._step(found.manifest) == self._step(manifest)
                    if found is None or replaced or not wants(found.manifest):
                        self._discard(self.inbox_of(older))

    def _publishing(self) -> AbstractContextManager[bool]:
        return publish_lock.publishing(self.path, "drain")
