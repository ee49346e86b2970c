"""What CheckpointCallback is compared with, behind the same few methods: not saving, and torch.save."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import ckpt

State = dict[str, Any]


class NoSaving:
    """The reference: what training costs by itself."""

    def __init__(self, directory: Path, *, every: int, **parts: Any) -> None:
        self._every, self._parts = every, parts

    def resume(self) -> int:
        return 0

    def step(self, step: int) -> TorchSave | None:
        return self.save(step) if step % self._every == 0 else None

    def save(self, step: int) -> TorchSave | None:
        return None

    def __enter__(self) -> NoSaving:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass


class TorchSaving(NoSaving):
    """torch.save as it must be done to survive a power cut: fsync, rename, fsync the directory."""

    def __init__(self, directory: Path, *, every: int, **parts: Any) -> None:
        super().__init__(directory, every=every, **parts)
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._path = directory, directory / "checkpoint.pt"

    def resume(self) -> int:
        if not self._path.exists():
            return 0
        found = torch.load(self._path, map_location="cpu", weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(found[name])
        set_rng_state(found["rng"])
        return int(found["step"])

    def save(self, step: int) -> TorchSave:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"rng": rng_state(), "step": step}
        started_at = time.monotonic()
        unfinished = self._path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            captured_at = time.monotonic()
            os.fsync(file.fileno())
        flushed_at = time.monotonic()
        unfinished.replace(self._path)
        fsync_directory(self._directory)
        durable_at = time.monotonic()
        instants = {"captured_at": captured_at, "flushed_at": flushed_at, "durable_at": durable_at}
        size = self._path.stat().st_size
        return TorchSave(ckpt.SaveStats(save_s=durable_at - started_at, bytes_total=size, started_at=started_at, **instants))


class TorchSave:
    """Looks like a ckpt.PendingSave, but nothing is pending: training has waited for it."""

    def __init__(self, stats: ckpt.SaveStats) -> None:
        self.stats = stats

    def done(self) -> bool:
        return True

    def exception(self) -> None:
        return None


def rng_state() -> State:
    """The random numbers that this training draws on."""
    state: State = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: State) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
