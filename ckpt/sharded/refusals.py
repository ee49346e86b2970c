"""Errors that name what of a sharded state cannot be saved, and say why: nothing need be added to them."""

from __future__ import annotations

from typing import NoReturn

import torch


class Refused(Exception):
    """Of the two below; those who catch them need no more than the type of Python's own."""


class RefusedType(Refused, TypeError):
    pass


class RefusedValue(Refused, ValueError):
    pass


def refuse_unpicklable(key: str, error: Exception) -> NoReturn:
    """A value that Python cannot pickle."""
    raise RefusedType(f"cannot save '{key}' of sharded=: it cannot be pickled: {error or type(error).__name__}") from error


def refuse_unreadable(key: str, tensor: torch.Tensor) -> None:
    """What could be saved, but not be loaded by torch.distributed.checkpoint."""
    if tensor.is_meta:
        raise RefusedValue(f"cannot save '{key}' of sharded=: it is on the meta device and has no values")
    if tensor.layout is not torch.strided:
        raise RefusedValue(f"cannot save '{key}' of sharded=: torch.distributed.checkpoint loads no tensors of {tensor.layout}")
