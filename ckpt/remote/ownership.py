"""Whose a place in an object store is: a small object names the one home that carries checkpoints there.

Nobody else may add to them, or remove some: two jobs that were given the same URL by mistake would mix. A job whose home is
lost restores from the store, saves to a new home, and takes the place over. From then on the old home, should it still be at
work somewhere, is refused: before each manifest that it puts its drain looks whether the place is still its own.
"""

from __future__ import annotations

import json

from ckpt.errors import CheckpointError, CorruptError
from ckpt.storage.object_store import ObjectStore, Small

NAME = "run.json"
_FORMAT = 1


class OwnedByAnotherError(CheckpointError):
    """The place is another home's."""


class Ownership:
    """
    Args:
        owner: names this home.
        home: its path, for messages.
        instead_of: the owner whose place this one takes, as a restore has found it; empty: nobody's.
    """

    def __init__(self, store: ObjectStore, owner: str, home: str, instead_of: str) -> None:
        self._store = store
        self._owner = owner
        self._home = home
        self._instead_of = instead_of

    def claim(self) -> None:
        """Safe to call again.

        Raises:
            OwnedByAnotherError: see there.
            ObjectStoreError: the store does not answer.
        """
        content = json.dumps({"format": _FORMAT, "owner": self._owner, "home": self._home}).encode() + b"\n"
        there = self._store.read_small(NAME)
        if there is None and self._store.create(NAME, content):
            return
        there = there or self._store.read_small(NAME)
        if there is not None and self._instead_of and _owner_in(there, self._store.url) == self._instead_of:
            if self._store.exchange(NAME, content, there):
                return
            there = self._store.read_small(NAME)
        self._expect(there)

    def expect(self) -> None:
        """
        Raises:
            OwnedByAnotherError, ObjectStoreError: as of claim().
        """
        self._expect(self._store.read_small(NAME))

    def _expect(self, there: Small | None) -> None:
        url = self._store.url
        if there is None:
            raise OwnedByAnotherError(f"'{url}/{NAME}' is gone, so nobody can tell whose '{url}' is; start the job anew")
        if _owner_in(there, url) != self._owner:
            raise OwnedByAnotherError(
                f"'{url}' belongs to the checkpoints of '{_home_in(there)}', not to those of '{self._home}'. Give "
                "Tier.remote(), or `ckpt copy`, a URL of its own; or, to go on from what lies there, call restore() before the "
                "first save to a directory without checkpoints"
            )


def find_owner(store: ObjectStore) -> tuple[str, str]:
    """Its name, and the path of its home; both empty: the place is nobody's.

    Raises:
        CorruptError: it cannot be told.
        ObjectStoreError: the store does not answer.
    """
    there = store.read_small(NAME)
    return ("", "") if there is None else (_owner_in(there, store.url), _home_in(there))


def _owner_in(there: Small, url: str) -> str:
    try:
        return str(json.loads(there.content)["owner"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"'{url}/{NAME}' cannot be understood ({error!r}): whose '{url}' is cannot be told") from error


def _home_in(there: Small) -> str:
    try:
        return str(json.loads(there.content)["home"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another home"
