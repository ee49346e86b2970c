"""Which parts of a saved object are wanted: patterns over the paths of its values."""

from __future__ import annotations

import fnmatch
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ckpt.errors import CheckpointError

_MOST_VISITS = 1_000_000  # of values: a small pickle can share containers so that its paths are without number
_SHOWN_PATHS = 8


def unfold(value: Any) -> list[tuple[Any, Any]] | None:
    """(key, part) of what has parts with keys or numbers; None for everything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return list(enumerate(value))
    return None


_NOTHING = object()


class Selection:
    """Which parts of an object are wanted: patterns over dotted paths, as in "model.layers.0.*".

    A path joins the keys of dicts and the positions in lists and tuples. "*" stands for any characters, dots too, "?" for one,
    "[ab]" for one of these; what matches is taken with all that is below it.

    Raises:
        TypeError, ValueError: the patterns are not texts, or there are none.
    """

    def __init__(self, keys: str | Sequence[str]) -> None:
        patterns = [keys] if isinstance(keys, str) else list(keys) if isinstance(keys, Iterable) else [keys]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"keys must be a pattern over dotted paths, such as 'model.*', or a list of such patterns, not {keys!r}"
            )
        if not patterns:
            raise ValueError("keys must name something; leave it out to load all")
        self._patterns = {pattern: re.compile(fnmatch.translate(pattern)) for pattern in patterns}
        self._unmatched: set[str] = set()
        self._paths: list[str] = []
        self._visits = 0

    def prune(self, value: Any, where: object) -> Any:
        """A copy of the containers with just what is wanted; in lists and tuples None stands for what is not.

        Raises:
            CheckpointError: a pattern matches nothing in `where`.
        """
        self._unmatched, self._paths, self._visits = set(self._patterns), [], 0
        pruned = self._prune(value, "", ())
        self._expect_all(where)
        return pruned

    def _expect_all(self, where: object) -> None:
        if self._unmatched:
            raise CheckpointError(
                f"'{where}' holds nothing that {sorted(self._unmatched)} match{'es' * (len(self._unmatched) == 1)}; its first "
                f"paths are {self._paths}"
            )

    def _prune(self, value: Any, path: str, inside: tuple[int, ...]) -> Any:
        self._visits += 1
        if self._visits > _MOST_VISITS:
            raise CheckpointError("this object has too many paths to choose from: load all of it")
        if path and self._is_wanted(path):
            return value
        parts = unfold(value)
        if parts is None or id(value) in inside:
            if len(self._paths) < _SHOWN_PATHS:
                self._paths.append(path)
            return _NOTHING
        inside = (*inside, id(value))
        kept = [(key, self._prune(part, f"{path}.{key}" if path else str(key), inside)) for key, part in parts]
        if all(part is _NOTHING for _, part in kept):
            return _NOTHING
        return _fold(value, kept)

    def _is_wanted(self, path: str) -> bool:
        matching = {pattern for pattern, compiled in self._patterns.items() if compiled.match(path)}
        self._unmatched -= matching
        return bool(matching)


class SharedSelection(Selection):
    """Over several files, which make one dict: what matches nothing in one of them is to match in another."""

    def __init__(self, keys: str | Sequence[str]) -> None:
        super().__init__(keys)
        self.begin()

    def begin(self) -> None:
        """Before the first file of each dict."""
        self._missed = set(self._patterns)
        self._seen: list[str] = []

    def prune(self, value: Any, where: object) -> Any:
        self._unmatched, self._paths, self._visits = set(self._patterns), [], 0
        pruned = self._prune(value, "", ())
        self._missed &= self._unmatched
        self._seen += [path for path in self._paths if path not in self._seen]
        return {} if pruned is _NOTHING else pruned

    def expect_all(self, where: object) -> None:
        """
        Raises:
            CheckpointError: a pattern has matched nothing anywhere.
        """
        self._unmatched, self._paths = self._missed, self._seen
        self._expect_all(where)


def _fold(value: Any, kept: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, Mapping):
        parts = {key: part for key, part in kept if part is not _NOTHING}
        return OrderedDict(parts) if isinstance(value, OrderedDict) else parts
    items: list[Any] = [None if part is _NOTHING else part for _, part in kept]
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return items
