"""How ranks choose a checkpoint: rank 0 names candidates, one after the other, and the first that is good on all is taken."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ckpt.coordinator import Coordinator

logger = logging.getLogger("ckpt")


class Candidate(NamedTuple):
    """A directory name, the sequence number of its manifest, and whether the ranks read a file of it together."""

    name: str
    sequence: int
    together: bool = False


# Looks at a candidate on this rank; says what is wrong with it, or None.
Verify = Callable[[Candidate], "str | None"]


class Chooser:
    """
    Args:
        stream: of the keys; no other conversation of this job uses it.
        timeout_s: how long to wait for the slowest rank, seconds; verifying a candidate must fit into it.
    """

    def __init__(self, coordinator: Coordinator, stream: str, timeout_s: float) -> None:
        self._coordinator = coordinator
        self._stream = stream
        self._timeout_s = timeout_s
        self._calls = 0
        self._asked = 0

    def begin(self) -> None:
        """To be called first, on all ranks: however the last one ended, they ask the same questions again."""
        self._calls += 1
        self._asked = 0

    def meet(self) -> None:
        """Returns when all ranks have called it."""
        self._collect(None)
        if self._coordinator.rank == 0:
            self._tell({})
        else:
            self._hear()

    def lead(
        self, candidates: Sequence[Candidate], rejected: Sequence[str], verify: Verify
    ) -> tuple[Candidate | None, list[str]]:
        """On rank 0: the first candidate that is good everywhere; else None, and what is wrong with each.

        Args:
            rejected: what is wrong with those that are no candidates.
        """
        causes_of_all = list(rejected)
        for candidate in candidates:
            self._tell(candidate._asdict())
            causes = self._collect(verify(candidate))
            self._tell({"good": not causes})
            if not causes:
                return candidate, []
            causes_of_all.append("; ".join(causes))
            logger.warning("checkpoint '%s' is passed over: %s", candidate.name, causes_of_all[-1])
        self._tell({"rejected": causes_of_all})
        return None, causes_of_all

    def follow(self, verify: Verify) -> tuple[Candidate | None, list[str]]:
        """On the other ranks."""
        while True:
            said = self._hear()
            if "rejected" in said:
                return None, list(said["rejected"])
            candidate = Candidate(**said)
            cause = verify(candidate)
            self._collect(cause)
            if self._hear()["good"] and cause is None:
                return candidate, []

    def _tell(self, message: dict[str, Any]) -> None:
        self._coordinator.broadcast(self._next_key(), json.dumps(message).encode(), self._timeout_s)

    def _hear(self) -> dict[str, Any]:
        return dict(json.loads(self._coordinator.broadcast(self._next_key(), None, self._timeout_s + 10)))

    def _collect(self, cause: str | None) -> list[str]:
        """Rank 0 gets what is wrong on any rank."""
        answers = self._coordinator.gather(self._next_key(), (cause or "").encode(), self._timeout_s) or []
        several = self._coordinator.world_size > 1
        return [f"rank {rank}: {a.decode()}" if several else a.decode() for rank, a in enumerate(answers) if a]

    def _next_key(self) -> str:
        self._asked += 1
        return f"{self._stream}/{self._calls}-{self._asked}"
