"""What rank 0 does between the answers of all ranks and its verdict: reads them, compares them, writes the manifest, tidies.

Rank 0 is a real Checkpointer with a real directory. The other ranks are answers that say of their own files what rank 0's says
of its own, and empty files of these names. The clock runs from the return of gather() to the call of broadcast().
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ckpt
from bench.measure.sampling import Sample, clock
from ckpt.coordinator import Coordinator

KEEP = 2
_OWN = "rank-00000"


class Chorus(Coordinator):
    """Rank 0 of many, of whom the others say what it says, each of a file of its own.

    Attributes:
        decided: how long rank 0 took for each save.
    """

    name = "chorus"
    rank = 0

    def __init__(self, size: int, directory: Path) -> None:
        self.world_size = size
        self.decided: list[Sample] = []
        self._directory = directory
        self._answered_s = 0.0

    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes]:
        said = json.loads(payload) if payload else None
        if not isinstance(said, dict) or "files" not in said:
            return [payload] * self.world_size
        answers = [payload, *(self._answer(said, rank) for rank in range(1, self.world_size))]
        self._answered_s = clock()
        return answers

    def _answer(self, said: Mapping[str, Any], rank: int) -> bytes:
        files = [
            {**file, "name": file["name"].replace(_OWN, f"rank-{rank:05d}"), "rank": rank, "bytes": 0} for file in said["files"]
        ]
        for file in files:
            (self._directory / f"step-{len(self.decided):012d}" / file["name"]).touch()
        return json.dumps({**said, "files": files}).encode()

    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        if self._answered_s:
            self.decided.append(Sample(self._answered_s, {"decided_s": clock() - self._answered_s}))
            self._answered_s = 0.0
        return payload or b""

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def decisions(size: int, directory: Path, rounds: int) -> list[Sample]:
    """One for each round; before them, as many saves as it takes until old ones are removed."""
    chorus = Chorus(size, directory)
    with ckpt.Checkpointer(directory, keep=KEEP, coordinator=chorus) as checkpointer:
        for step in range(KEEP + 1 + rounds):
            checkpointer.save(step, {"weights": torch.zeros(1000)}).result()
    return chorus.decided[KEEP + 1 :]
