"""Methods of one object that others take the place of for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def shadowed(owner: Any, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block the object has these in the place of its own, whatever class overrides them."""
    own = vars(owner)
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            own.pop(name, None)
        own.update(before)
