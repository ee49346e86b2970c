"""A round of gather and broadcast as a commit makes it, after which every rank knows what all have said."""

from __future__ import annotations

import pickle

from ckpt.coordinator.base import VERDICT_S, Coordinator, missing_error
from ckpt.errors import PeerError


def exchange(c: Coordinator, key: str, payload: bytes, timeout_s: float) -> list[bytes]:
    """The payloads of all, in the order of ranks. If ranks are missing, all that are there get the same PeerError."""
    if c.rank == 0:
        try:
            answers = dict(enumerate(c.gather(key, payload, timeout_s) or []))
        except PeerError as error:
            c.broadcast(key, pickle.dumps(dict(error.payloads)), timeout_s)
            raise
        c.broadcast(key, pickle.dumps(answers), timeout_s)
    else:
        assert c.gather(key, payload, timeout_s) is None
        answers = pickle.loads(c.broadcast(key, None, timeout_s + VERDICT_S))
    missing = [rank for rank in range(c.world_size) if rank not in answers]
    if missing:
        raise missing_error(key, missing, answers, timeout_s)
    return [answers[rank] for rank in range(c.world_size)]
