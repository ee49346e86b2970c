"""Where in an object pickling fails, and for which file it was: Python's own error says neither."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from ckpt.plan.pickler import dump

_DEEPEST = 50
_DEFAULT = (object.__reduce_ex__, object.__reduce__)
_OWN_MODULES = ("builtins", "pickle", "_pickle")  # whose errors are texts, and nothing else


def explain(error: Exception, obj: Any, file: object) -> None:
    """Adds this to an error, which stays the same object of the same type."""
    path = "" if isinstance(error, RecursionError) else _path_to_culprit(obj)
    text = f"cannot save to '{file}': " + (f"what is at {path} cannot be pickled: " if path else "")
    if type(error).__module__ in _OWN_MODULES and len(error.args) == 1 and str(error) == error.args[0]:
        error.args = (f"{text}{error}",)
    elif hasattr(error, "add_note"):  # Python 3.11
        error.add_note(text.rstrip(": "))


def _path_to_culprit(obj: Any) -> str:
    """As one would write it behind the name of the object; empty if it is the object itself, or is not found."""
    path = ""
    for _ in range(_DEEPEST):
        for key, part in _parts_of(obj):
            if not _can_be_pickled(part):
                path, obj = path + key, part
                break
        else:
            return path
    return path


def _parts_of(obj: Any) -> Iterator[tuple[str, Any]]:
    kind: Any = type(obj)
    if kind in (dict, OrderedDict):
        yield from ((f"[{key!r}]", part) for key, part in obj.items())
    elif kind in (list, tuple):
        yield from ((f"[{index}]", part) for index, part in enumerate(obj))
    elif (kind.__reduce_ex__, kind.__reduce__) == _DEFAULT:
        yield from ((f".{name}", part) for name, part in getattr(obj, "__dict__", {}).items())


def _can_be_pickled(obj: Any) -> bool:
    try:
        dump(obj, {})
    except Exception:
        return False
    return True
