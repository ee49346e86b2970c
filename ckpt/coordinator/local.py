"""The coordinator of a job of one process."""

from __future__ import annotations

from ckpt.coordinator.base import Coordinator, given


class LocalCoordinator(Coordinator):
    """A world of one: nobody to wait for."""

    name = "local"
    rank = 0
    world_size = 1

    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes]:
        return [payload]

    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        return given(payload, key)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass
