"""Whether all ranks may go on, before any of them begins: each says what it can, rank 0 judges, all hear the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ckpt.coordinator import Coordinator
from ckpt.errors import PeerError

Refusal = dict[str, str]  # "kind": the name of an error, "text": what it says


def find_refusal(
    coordinator: Coordinator,
    key: str,
    own: Mapping[str, Any],
    judge: Callable[[list[dict[str, Any]]], Refusal | None],
    timeout_s: float,
) -> Refusal | None:
    """What keeps the ranks from going on, the same on all of them; None: nothing.

    Args:
        key: of the messages; nothing else uses it.
        judge: on rank 0, given what each rank says, in their order.

    Raises:
        PeerError: on another rank, rank 0 does not answer. To rank 0 a missing rank is a refusal: the others wait for word.
    """
    refusal = None
    try:
        answers = coordinator.gather(f"{key}-ranks", json.dumps(own).encode(), timeout_s)
        if answers is not None:
            refusal = judge([json.loads(answer) for answer in answers])
    except PeerError as missing:
        if coordinator.rank != 0:
            raise
        refusal = {"kind": PeerError.__name__, "text": str(missing)}
    said = coordinator.broadcast(key, json.dumps(refusal).encode(), 2 * timeout_s)
    return json.loads(said) or None
