"""What the drain is told that carries checkpoints from home to an object store.

    home/.remote/<place>/
        remote.json      this
        holds.json       what must stay at home meanwhile: see directory/holds.py
        drain/           the journals, as of the drain of a node
        taken            the ticket with which the place was taken over from another home
        .drain.lock      held by the one drainer
        drain.log        what it says
        pace             how the training runs

<place> is made of the URL, so that of two places of one home each has its own. Nothing secret is written here: options that may
be are told to the drain when it is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.directory import holds
from ckpt.directory import manifest as manifests
from ckpt.directory.holds import BACK, FOLDER
from ckpt.directory.step_names import names_in
from ckpt.drain.node import LOCK, began_at
from ckpt.errors import InUseError, NotACheckpointError
from ckpt.remote.ownership import Ownership
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.object_store import PLAIN_OPTIONS, ObjectStore
from ckpt.storage.object_urls import parse_url

logger = logging.getLogger("ckpt")

NAME = "remote.json"
PACE = "pace"
_TAKEN = "taken"


@dataclasses.dataclass(frozen=True)
class Remote:
    """
    Attributes:
        owner: names this home in the store, see ckpt/remote/ownership.py.
        instead_of: the owner whose place it takes, because a restore has found its checkpoints; empty: nobody's.
        ticket: of this taking over: each is done once.
        keep: how many committed checkpoints stay there; None: all.
        every_steps, every_s: which go there: those of each n-th step, or one each so many seconds; neither: the newest, always.
        rate: bytes a second, or None for "auto".
        pace: the file in which the training says how it runs.
        pids: of the process that starts the drain, and when it began, in ticks since the boot.
        options: those that are no secret.
        host: of that process; empty: an older version has written this, it is taken for ours.
    """

    url: str
    home: Path
    owner: str
    instead_of: str
    ticket: str
    keep: int | None
    every_steps: int | None
    every_s: float | None
    rate: int | None
    direct_io: bool
    pace: Path
    pids: Mapping[int, int]
    options: Mapping[str, str]
    host: str = ""

    @property
    def is_here(self) -> bool:
        """Whether the job is of this host; of another one nobody can tell here whether it goes on."""
        return self.host in ("", socket.gethostname())

    def is_trained(self) -> bool:
        """Whether the process lives that has started the drain. False on another host."""
        return self.is_here and any(began_at(pid) == began for pid, began in self.pids.items())


def place_of(home: Path, url: str) -> Path:
    """The directory at home of what is carried to this URL."""
    return home / FOLDER / hashlib.sha256(str(parse_url(url)).encode()).hexdigest()[:12]


def home_of(place: Path) -> Path:
    """The other way round."""
    return place.parents[1]


def release_unused(home: Path, used: Path | None) -> None:
    """Home keeps nothing any more for places to which nobody carries, of a job that was killed, or of a URL that it had before.

    Args:
        used: the place of the job whose home it is; None: it has none.
    """
    try:
        others = [home / FOLDER / name for name in names_in(home / FOLDER) if not name.startswith(BACK)]
        for place in others:
            if place != used and (place / holds.NAME).exists():
                with contextlib.suppress(InUseError):
                    DirectoryLock(place, name=LOCK).expect_free(0.0)
                    durable.remove_quietly(place / holds.NAME)
    except OSError as error:
        logger.warning("what home keeps for an object store that is used no more stays there: %s", error)


def new_name() -> str:
    """Of an owner, or a ticket."""
    return secrets.token_hex(8)


def was_taken(place: Path, ticket: str) -> bool:
    """Whether the place was taken over with this ticket: it may be another home's again by now."""
    try:
        return (place / _TAKEN).read_text(encoding="ascii") == ticket
    except (OSError, ValueError):
        return False


def note_taken(place: Path, ticket: str) -> None:
    """
    Raises:
        StorageError: it cannot be noted.
    """
    if not was_taken(place, ticket):
        durable.replace_durably(place / _TAKEN, ticket.encode(), "taken")


def claim(place: Path, remote: Remote, store: ObjectStore) -> Ownership:
    """Makes the place in the store this home's, if it is nobody's, or that of the one whose place it takes.

    Raises:
        OwnedByAnotherError: it is another home's.
        ObjectStoreError: the store does not answer.
        StorageError: that it was taken over cannot be noted.
    """
    instead_of = "" if was_taken(place, remote.ticket) else remote.instead_of
    ownership = Ownership(store, remote.owner, str(remote.home), instead_of)
    ownership.claim()
    note_taken(place, remote.ticket)
    return ownership


def write(place: Path, remote: Remote) -> None:
    """Durably. `place` is there.

    Raises:
        StorageError: it cannot be written.
    """
    document: dict[str, Any] = {**dataclasses.asdict(remote), "home": str(remote.home), "pace": str(remote.pace)}
    document |= {"format": manifests.FORMAT, "pids": {str(pid): began for pid, began in remote.pids.items()}}
    document["options"] = {key: value for key, value in remote.options.items() if key in PLAIN_OPTIONS and "@" not in value}
    durable.remove_stale(place / NAME)
    durable.replace_durably(place / NAME, manifests.with_checksum(document), "remote")


def read(place: Path) -> Remote:
    """
    Raises:
        NotACheckpointError: it does not say what it should.
    """
    path = place / NAME
    try:
        said = {"host": "", **manifests.parse_checked(path.read_bytes())}
        fields = {field.name: said[field.name] for field in dataclasses.fields(Remote)}
        fields |= {"home": Path(said["home"]), "pace": Path(said["pace"]), "url": str(parse_url(said["url"]))}
        fields |= {"pids": {int(pid): int(began) for pid, began in said["pids"].items()}}
        return Remote(**fields)
    except OSError as error:
        raise NotACheckpointError(f"'{path}' cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise NotACheckpointError(f"'{path}' does not describe a place in an object store: {error!r}") from error


def read_if_any(place: Path) -> Remote | None:
    """None if there is none that can be understood."""
    try:
        return read(place)
    except NotACheckpointError:
        return None
