"""Errors that name what of a sharded state cannot be saved, and say why: nothing need be added to them."""

from __future__ import annotations

from typing import NoReturn


class Refused(Exception):
    """Of the two below; those who catch them need no more than the type of Python's own."""


class RefusedType(Refused, TypeError):
    pass


class RefusedValue(Refused, ValueError):
    pass


def refuse_unpicklable(key: str, error: Exception) -> NoReturn:
    """A value that Python cannot pickle."""
    raise RefusedType(f"cannot save '{key}' of sharded=: it cannot be pickled: {error or type(error).__name__}") from error
