"""The engines of DeepSpeed that save_state() saves: lazily, as parts of the state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ckpt

from .. import deepspeed as lazy
from ..huggingface.open_bundle import OpenBundle


@contextlib.contextmanager
def saving_into(bundle: OpenBundle, engines: Sequence[Any], options: ckpt.Options | None) -> Iterator[None]:
    """Meanwhile save_checkpoint() waits for nothing, and the bundle is complete only with what it has begun.

    Engines that do not checkpoint lazily yet do so from now on. All ranks call it.
    """
    for engine in engines:
        if not lazy.is_attached(engine):
            lazy.attach(engine, options)
    with lazy.collecting() as begun:
        yield
    for pending in begun:
        bundle.follow(pending)
