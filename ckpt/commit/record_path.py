"""What a user calls a record of a file: where in the saved object its tensor stands, read off the pickle.

The objects themselves may be gone by the time that somebody asks. Nothing of what the pickle names is imported or called.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Container, Iterator
from typing import Any

_MOST_OBJECTS = 200_000  # looked at before the search is given up


def name_of_record(pickled: bytes, key: int) -> str:
    """The tensor whose bytes are `data/<key>`, in words for an error: its path and its shape."""
    try:
        found = _find(_Skeleton(io.BytesIO(pickled)).load(), str(key))
    except Exception:  # whatever a class of the user's has put there, the report comes first
        found = None
    return found or f"a tensor (record data/{key})"


def name_of_instance(pickled: bytes, kinds: Container[str]) -> tuple[str, str] | None:
    """The class and the path of the first instance of one of these classes; None if there is none."""
    try:
        return _find_instance(_Skeleton(io.BytesIO(pickled)).load(), kinds)
    except Exception:  # as above
        return None


class _Storage:
    def __init__(self, key: str) -> None:
        self.key = key


class _Thing:
    """Stands for an object of any other class: what it was made of, and what it was given then."""

    def __new__(cls, *args: Any, **_: Any) -> _Thing:
        self = super().__new__(cls)
        self.args, self.given = args, []
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        self.args: tuple[Any, ...]
        self.given: list[tuple[str | None, Any]]

    def __setstate__(self, state: Any) -> None:
        self.given.append((None, state))

    def append(self, item: Any) -> None:
        self.given.append((str(len(self.given)), item))

    def __setitem__(self, key: Any, item: Any) -> None:
        self.given.append((str(key), item))


class _Skeleton(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return collections.OrderedDict if (module, name) == ("collections", "OrderedDict") else type(name, (_Thing,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _Storage(pid[2])


def _find_instance(root: Any, kinds: Container[str]) -> tuple[str, str] | None:
    for path, value in _walk(root):
        if isinstance(value, _Thing):
            made_of = [each.__name__ for each in value.args if isinstance(each, type)]  # torch makes subclasses by a function
            kind = next((each for each in (type(value).__name__, *made_of) if each in kinds), None)
            if kind is not None:
                return kind, path
    return None


def _find(root: Any, key: str) -> str | None:
    """Nearest first."""
    for path, value in _walk(root):
        if isinstance(value, _Storage) and value.key == key:
            return f"the storage '{path}'"
        if isinstance(value, _Thing) and value.args and isinstance(value.args[0], _Storage) and value.args[0].key == key:
            shape = f" of shape {list(value.args[2])}" if len(value.args) > 2 and isinstance(value.args[2], tuple) else ""
            return f"the tensor '{path}'{shape}"
    return None


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """All that it holds, with paths, nearest first."""
    waiting: collections.deque[tuple[str, Any]] = collections.deque([("", root)])
    seen = {id(root)}
    while waiting and len(seen) <= _MOST_OBJECTS:
        path, value = waiting.popleft()
        yield path, value
        for step, item in _parts(value):
            if id(item) not in seen and not isinstance(item, (str, bytes, int, float, type(None))):
                seen.add(id(item))
                waiting.append((path if step is None else f"{path}/{step}" if path else step, item))


def _parts(value: Any) -> Iterator[tuple[str | None, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif isinstance(value, _Thing):
        for argument in value.args:
            yield None, argument
        for step, item in value.given:
            if step is None and isinstance(item, dict):
                yield from _parts(item)
            else:
                yield step, item
