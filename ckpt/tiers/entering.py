"""The first save by way of the nodes: each rank looks at the disk of its node, and rank 0 says who is on which."""

from __future__ import annotations

import json

from ckpt.coordinator import Coordinator
from ckpt.errors import CheckpointError, PeerError
from ckpt.tiers.node_level import NodeLevel


class NodeEntry:
    """Of one session.

    Args:
        timeout_s: how long ranks wait for each other, seconds.
    """

    def __init__(self, coordinator: Coordinator, timeout_s: float) -> None:
        self._coordinator = coordinator
        self._timeout_s = timeout_s
        self._arranged: bytes | None = None  # on rank 0: what it says of the nodes

    def enter(self, nodes: NodeLevel, key: str, run: str, token: str, step: int, refusal: str = "") -> None:
        """All ranks call it. Safe to call again, with another key.

        Args:
            key: of the messages; nothing else uses it.
            run, token, step: see NodeLevel.look() and arrange().
            refusal: why this rank cannot save by way of its node; empty: it looks.

        Raises:
            PeerError: a rank does not answer; or rank 0 may not save; or a disk cannot be used, and the tier is required.
            CheckpointError: rank 0 may not save.
        """
        if not nodes.entered:
            self._look(nodes, key, run, token, step, refusal)
        own = self._arranged if self._coordinator.rank == 0 else None
        answer = json.loads(self._coordinator.broadcast(key, own, self._timeout_s))
        if "refusal" in answer:
            raise PeerError(f"rank 0 may not save by way of the nodes: {answer['refusal']}", (0,))
        nodes.enter(answer)

    def _look(self, nodes: NodeLevel, key: str, run: str, token: str, step: int, refusal: str) -> None:
        try:
            said = nodes.refuse(refusal) if refusal else nodes.look(run, token)
            found = self._coordinator.gather(f"{key}-found", said, self._timeout_s)
            if found is not None:
                self._arranged = json.dumps(nodes.arrange(found, run, step)).encode()
        except CheckpointError as error:
            if self._coordinator.rank == 0:
                self._coordinator.broadcast(key, json.dumps({"refusal": str(error)}).encode(), self._timeout_s)
            raise
